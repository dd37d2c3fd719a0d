"""The backend chosen for a model reaches the operator."""

from __future__ import annotations

import pytest
import torch

from longctx.errors import LongctxError
from longctx.mesh import Mesh
from longctx.models.attach import attach_attention
from longctx.models.hook.binding import binding_of


def test_the_backend_of_a_binding_is_the_one_that_computes(monkeypatch: pytest.MonkeyPatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, num_key_value_heads=1))
    attach_attention(model, Mesh())
    binding = binding_of(model)
    assert binding is not None and binding.backend == "auto"
    ids = torch.arange(16)[None]
    logits = {}
    for backend in ("auto", "aten", "reference"):
        binding.backend = backend
        logits[backend] = model(ids, position_ids=ids, use_cache=False).logits
    assert torch.equal(logits["auto"], logits["aten"])
    torch.testing.assert_close(logits["reference"], logits["aten"])
    binding.backend = "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(LongctxError, match="triton"):
        model(ids, position_ids=ids, use_cache=False)
