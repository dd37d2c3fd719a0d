"""Models are built under the given ZeRO-3 configuration, and only within the block; weights follow the seed."""

from __future__ import annotations

import pytest
import torch
from models.zoo import tiny_config, tiny_model
from transformers.integrations import deepspeed

from longctx.errors import ModelError
from longctx.models.load.zero3 import allow_resizing, draw_weights, partitioned_by

SETTINGS = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}


def test_transformers_knows_of_zero3_only_within_the_block() -> None:
    assert not deepspeed.is_deepspeed_zero3_enabled()
    with pytest.raises(RuntimeError), partitioned_by(SETTINGS):
        assert deepspeed.is_deepspeed_zero3_enabled() and deepspeed.deepspeed_config() == SETTINGS
        raise RuntimeError
    assert not deepspeed.is_deepspeed_zero3_enabled()


def test_gathered_weights_are_not_resized() -> None:
    model = tiny_model(tiny_config("llama"), "sdpa")
    weight = model.model.embed_tokens.weight
    weight.ds_numel = weight.numel()
    allow_resizing(model, SETTINGS)
    with pytest.raises(ModelError, match=r"model.embed_tokens.weight is gathered; call it outside"):
        model.resize_token_embeddings(70)


def test_weights_drawn_again_follow_the_generator_alone() -> None:
    model = tiny_model(tiny_config("llama"), "sdpa")
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        draw_weights(model, partitioned=False)
        drawn.append([parameter.detach().clone() for parameter in model.parameters()])
        torch.nn.init.zeros_(model.lm_head.weight)
    assert all(map(torch.equal, *drawn)) and float(drawn[0][0].std()) > 0
