"""Configs from one set of size names; what does not fit is named."""

from __future__ import annotations

import pytest
import torch

from longctx.errors import ModelError
from longctx.models.load.pretrained import make_model
from longctx.models.load.scratch import make_config


def test_config_from_sizes_names_what_is_wrong() -> None:
    for arguments, message in (
        (dict(architecture="lama"), "did you mean 'llama'"),
        (dict(architecture="llama", heads=6, kv_heads=4), "kv_heads=4"),
        (dict(architecture="llama", heads=6, hidden_size=32), "hidden_size=32 is not a multiple of heads=6"),
        (dict(architecture="gpt2", heads=4, kv_heads=2), "no grouped-query attention"),
        (dict(architecture="llama", extra={"rope_parametres": {}}), "did you mean 'rope_parameters'"),
        (dict(architecture="qwen2", hidden_size=64, heads=4, head_dim=32), "no head_dim of its own"),
    ):
        with pytest.raises(ModelError, match=message):
            make_config(**arguments)  # type: ignore[arg-type]
    config = make_config(
        "gpt2", hidden_size=48, layers=3, heads=4, max_positions=99, vocab_size=50, tie_embeddings=True
    )
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions, config.n_inner) == (48, 3, 4, 99, 192)
    assert config.attn_pdrop == 0.0 and config.tie_word_embeddings
    model = make_model(make_config("llama", hidden_size=48, layers=1, heads=4, vocab_size=50), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.config.intermediate_size == 128
    assert model.config._attn_implementation == "longctx"
