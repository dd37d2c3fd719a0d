"""FLOPs and bytes of a micro-batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape, shape_of_settings
from longctx.plan.work import exact_pairs, flops_of, pairs, state_bytes, wire_of, zero_bytes
from longctx.train.report.flops import FlopsModel

LLAMA_8B = ModelShape(4096, 32, 32, 8, 128, 14336, 128256)


@pytest.mark.parametrize("window", [None, 100])
def test_flops_are_those_that_training_counts(window: int | None) -> None:
    from transformers import MistralConfig

    config = MistralConfig(
        vocab_size=300, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, sliding_window=window,
    )  # fmt: skip
    shape, length = shape_of_settings(config.to_dict(), 4), 512
    counted = FlopsModel(config, shape.parameters)
    batch = {"position_ids": torch.arange(length)[None], "document_ids": torch.zeros(1, length, dtype=torch.int32)}
    seen = pairs(shape, Setup(length))
    assert seen == counted.pairs(batch)
    norms = 6 * (2 * shape.layers + 1) * shape.hidden * length  # training counts their few weights as products
    assert flops_of(shape, Setup(length)).useful + norms == pytest.approx(counted.step(length, seen), rel=1e-12)


@pytest.mark.parametrize("window", [None, 1, 3, 9, 20])
def test_pairs_are_those_of_the_mask(window: int | None) -> None:
    index = torch.arange(9)
    seen = (index[:, None] >= index) & (index[:, None] - index < (window or 9))
    assert exact_pairs(9, window) == seen.sum()


def test_recomputation_costs_what_it_repeats() -> None:
    flops = {policy: flops_of(LLAMA_8B, Setup(4096, recompute=policy)) for policy in ("none", "mlp", "layer")}
    kept = flops_of(LLAMA_8B, Setup(4096, recompute="layer_keep_attention"))
    assert len({each.useful for each in flops.values()} | {kept.useful}) == 1
    assert flops["none"].again_products == flops["none"].again_attention == 0
    assert flops["mlp"].again_products == 2 * LLAMA_8B.mlp_products * 4096
    assert flops["layer"].done - kept.done == flops["layer"].again_attention == flops["layer"].attention_forward
    assert flops_of(LLAMA_8B, Setup(4096, mlp_tile=512)) == flops["mlp"], "tiles recompute MLPs"


def test_zero_sends_what_its_collectives_do() -> None:
    """All-reduce: twice the gradients, in fp32 where ranks share a sequence; stages 1 and 2 gather weights after it."""
    numbers = LLAMA_8B.parameters * 7 / 8
    for stage, each in ((0, 2 * 4), (1, 2 * 4 + 2), (2, 2 * 4 + 2), (3, 2 * 2 + 4)):
        assert zero_bytes(LLAMA_8B, Setup(2**16, ring=8, stage=stage)) == int(each * numbers)
    assert zero_bytes(LLAMA_8B, Setup(2**16, data=8, stage=0)) == int(2 * 2 * numbers)
    assert zero_bytes(LLAMA_8B, Setup(2**16)) == 0


def test_bounded_layers_send_states_and_no_keys() -> None:
    bounded = replace(LLAMA_8B, bounded_layers=LLAMA_8B.layers, slots=64)
    short, long = (wire_of(bounded, Setup(tokens, ring=4, recompute="mlp")) for tokens in (2**12, 2**20))
    assert short.states == long.states > 0 and short.ring_forward == short.ulysses == 0
    assert state_bytes(bounded, Setup(2**12)) == 4 * 8 * 64 * (2 * 128 + 1)
    assert wire_of(LLAMA_8B, Setup(2**12, ring=4)).states == 0
