"""The projections read from a module are those that it computes with, whatever its class calls them."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from longctx.generation.projections import spec_of, unsupported

SIZES = dict(vocab_size=16, num_hidden_layers=1, num_attention_heads=2)


def test_a_fused_projection_is_read_in_parts() -> None:
    module = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2)).transformer.h[0].attn
    spec = spec_of(module)
    assert spec is not None and getattr(module, spec.heads) == 2 and spec.scaled
    weights, x = spec.projections(module), torch.randn(3, 8)
    wanted = module.c_attn(x).split(8, -1)
    for w, b, out in zip(
        (weights.w_q, weights.w_k, weights.w_v), (weights.b_q, weights.b_k, weights.b_v), wanted, strict=True
    ):
        torch.testing.assert_close(torch.nn.functional.linear(x, w, b), out)
    assert weights.w_q.data_ptr() == module.c_attn.weight.data_ptr()  # a view


def test_decoders_and_cross_attention_are_told_apart() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    found = {}
    for name, module in model.named_modules():
        spec = spec_of(module)
        if spec is not None:
            found[name] = (spec.decodes(module, name), spec.crosses(module, name), spec.scaled)
    assert sorted(found.values()) == [(False, False, False), (True, False, False), (True, True, False)]


def test_bart_is_read_by_its_own_names() -> None:
    config = BartConfig(vocab_size=16, d_model=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8)
    layer = BartForCausalLM(config).model.decoder.layers[0]
    spec = spec_of(layer.self_attn)
    assert spec is not None and spec.projections(layer.self_attn).w_o is layer.self_attn.out_proj.weight


@pytest.mark.parametrize("message", ["rotates its keys by their positions"])
def test_rope_is_the_reason_that_is_given(message: str) -> None:
    model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, **SIZES))
    assert not any(spec_of(module) for module in model.modules())
    assert message in str(unsupported(model))
    assert "Linear has no attention module" in str(unsupported(torch.nn.Linear(2, 2)))
