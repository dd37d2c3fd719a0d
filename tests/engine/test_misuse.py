"""What an engine refuses, by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from engine_tiny import make_engine, ragged_rows, run_ranks, tiny_llama

from longctx.errors import EngineError


def misused(rank: int, world: int) -> list[str]:
    import longctx

    engine = make_engine(2, 1, gas=2)
    rows = ragged_rows(0, 0, engine.mesh.data_rank)
    messages = []

    def refused(action: Any) -> None:
        with pytest.raises(EngineError) as error:
            action()
        messages.append(str(error.value))

    refused(lambda: engine.global_loss)
    refused(lambda: engine.shard(rows))
    refused(lambda: engine.backward(torch.zeros((), requires_grad=True), scale_wrt_gas=True))
    refused(lambda: engine.scale(torch.zeros((), requires_grad=True)))
    model = tiny_llama()
    refused(lambda: longctx.initialize(model, {}, engine.mesh, mpu=engine.mesh))
    refused(lambda: longctx.initialize(None, {}, engine.mesh))
    assert math.isnan(engine.grad_norm)
    engine.destroy()
    return messages


def test_misuse_is_named() -> None:
    for first, window, scale, by_hand, mpu, model in run_ranks(4, misused):
        assert "no window" in first and "gradient_accumulation_steps is 2" in window
        assert "scale_wrt_gas" in scale and "engine.backward(loss)" in by_hand
        assert "mpu" in mpu and "needs a model" in model


def local_mean(rank: int, world: int) -> str:
    """BERT's head takes num_items_in_batch and returns its local mean all the same."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    engine = make_engine(2, 1, model=BertForMaskedLM(config))
    rows = ragged_rows(0, 0, engine.mesh.data_rank)
    rows["shift_labels"] = rows.pop("labels")  # a masked model predicts the token itself
    batch = engine.shard(rows)
    with pytest.raises(EngineError) as error:
        engine(**batch)
    engine.destroy()
    return str(error.value)


def test_a_model_that_returns_its_local_mean_is_refused_by_name() -> None:
    messages = run_ranks(4, local_mean)
    assert any("BertForMaskedLM" in message and "token_mean" in message for message in messages)
