"""Shards without a label, frozen weights, adapters, activation checkpointing, bf16: all equal one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_tiny import (
    make_engine,
    make_optimizer,
    ragged_rows,
    run_ranks,
    run_window,
    tiny_llama,
    train_plainly,
    weights_of,
)

from tolerances import tolerance

STAGES = [0, 1, 2, 3]


def lonely_rows(step: int, micro_batch: int, replica: int) -> dict[str, torch.Tensor]:
    """Rows whose few labels lie on one rank of the ring; replica 1 has none at all."""
    rows = ragged_rows(step, micro_batch, replica)
    length = rows["labels"].shape[1]
    keep = torch.zeros(length, dtype=torch.bool)
    if replica == 0:
        keep[1:4] = True  # the first zigzag chunk: rank 0's
    return {**rows, "labels": rows["input_ids"].masked_fill(~keep, -100), "position_ids": torch.arange(length)}


FROZEN = {
    "queries": "q_proj",
    "keys": "k_proj",
    "values": "v_proj",
    "first layer": "layers.0",
    "all but an adapter": "",
}


def freeze(model: torch.nn.Module, frozen: str | None) -> torch.nn.Module:
    if frozen == "all but an adapter":
        return add_adapters(model)
    for name, parameter in model.named_parameters():
        if frozen is not None and FROZEN[frozen] in name:
            parameter.requires_grad_(False)
    return model


class Adapter(torch.nn.Module):
    """A LoRA-style pair of thin matrices beside a frozen linear layer."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = torch.nn.Linear(linear.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.up(self.down(x))


def add_adapters(model: torch.nn.Module) -> torch.nn.Module:
    model.requires_grad_(False)
    torch.manual_seed(11)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
        layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj)
    return model


def partly(rank: int, world: int, ring: int, stage: int, frozen: str | None, rows: str, checkpointing: bool) -> Any:
    model = freeze(tiny_llama(), frozen)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    engine = make_engine(ring, stage, model=model, gas=2)
    losses, norms = [], []
    make_rows = lonely_rows if rows == "lonely" else ragged_rows
    for step in range(3):
        run_window(engine, [make_rows(step, index, engine.mesh.data_rank) for index in range(2)])
        losses.append(engine.global_loss)
        norms.append(engine.grad_norm)
    weights = weights_of(engine)
    engine.destroy()
    return losses, norms, weights


def check_partly(stage: int, frozen: str | None = None, rows: str = "ragged", checkpointing: bool = False) -> None:
    model = freeze(tiny_llama(), frozen)
    optimizer = make_optimizer("sgd", [p for p in model.parameters() if p.requires_grad])
    make_rows = lonely_rows if rows == "lonely" else ragged_rows
    truth = train_plainly(model, optimizer, steps=3, replicas=2, accumulation=2, clip=0, rows=make_rows)
    for losses, norms, weights in run_ranks(4, partly, 2, stage, frozen, rows, checkpointing):
        torch.testing.assert_close(losses, truth["losses"], rtol=tolerance("training loss"), atol=0)
        torch.testing.assert_close(norms, truth["norms"], rtol=tolerance("training norm"), atol=0)
        for name, weight in truth["weights"].items():
            assert (weights[name] - weight).norm() <= tolerance("training weight") * weight.norm(), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_or_replica_without_a_label_contributes_nothing(stage: int) -> None:
    check_partly(stage, rows="lonely")


FROZEN_CELLS = [
    pytest.param(frozen, stage, marks=() if stage == 0 or "adapter" in frozen else pytest.mark.deep)
    for frozen in FROZEN
    for stage in (0, 2, 3)
]


@pytest.mark.parametrize(("frozen", "stage"), FROZEN_CELLS)
def test_partial_training_neither_hangs_nor_errs(stage: int, frozen: str) -> None:
    check_partly(stage, frozen)


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.deep)])
def test_activation_checkpointing_changes_nothing(stage: int) -> None:
    check_partly(stage, checkpointing=True)


def smoke(rank: int, world: int, stage: int, config: dict[str, Any]) -> list[float]:
    engine = make_engine(2, stage, gas=2, gradient_clipping=1.0, **config)
    losses = []
    for _ in range(6):
        run_window(engine, [ragged_rows(0, index, engine.mesh.data_rank) for index in range(2)])
        losses.append(engine.global_loss)
        assert 0 < engine.grad_norm < 10
    engine.destroy()
    return losses


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        (0, {}),
        (1, {}),
        (1, {"data_types": {"grad_accum_dtype": "fp32"}}),
        pytest.param(2, {"offload": True}, marks=pytest.mark.deep),
        (3, {}),
        pytest.param(3, {"data_types": {"grad_accum_dtype": "fp32"}}, marks=pytest.mark.deep),
    ],
)
def test_bf16_learns_and_agrees_with_fp32(stage: int, config: dict[str, Any]) -> None:
    model = tiny_llama()
    optimizer = make_optimizer("sgd", model.parameters())
    rows = lambda step, index, replica: ragged_rows(0, index, replica)  # noqa: E731
    truth = train_plainly(model, optimizer, steps=6, replicas=2, accumulation=2, clip=1.0, rows=rows)
    results = run_ranks(4, smoke, stage, {"bf16": {"enabled": True}, **config})
    assert all(result == results[0] for result in results)
    torch.testing.assert_close(results[0], truth["losses"], rtol=tolerance("bf16 training loss"), atol=0)
    assert results[0][-1] < results[0][0]
