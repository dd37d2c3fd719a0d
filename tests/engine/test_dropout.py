"""Attention dropout under the engine: a function of seed, step and row, however the global batch is shared out."""

from __future__ import annotations

import pytest
import torch
from engine_tiny import VOCABULARY, make_engine, run_ranks, run_window, tiny_llama

from longctx.engine.dropout import row_seeds

from tolerances import tolerance

STEPS, ROWS, LENGTH = 3, 4, 21


def global_batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def worker(rank: int, world: int, ring: int, micro: int, stage: int, checkpointing: bool) -> list[float]:
    """Losses of a model that drops attention, its batch of four rows shared out in micro-batches of `micro`."""
    replicas = world // ring
    gas = ROWS // (replicas * micro)
    model = tiny_llama(attention_dropout=0.3)
    if checkpointing:
        model.gradient_checkpointing_enable()
    engine = make_engine(ring, stage, model=model, gas=gas, train_micro_batch_size_per_gpu=micro)
    engine.train()
    losses = []
    for step in range(STEPS):
        batch = global_batch(step)
        parts = [(index * replicas + engine.mesh.data_rank) * micro for index in range(gas)]
        run_window(engine, [{key: x[first : first + micro] for key, x in batch.items()} for first in parts])
        losses.append(engine.global_loss)
    engine.destroy()
    return losses


@pytest.fixture(scope="module")
def truth() -> list[float]:
    return run_ranks(1, worker, 1, 2, 0, False)[0]


@pytest.mark.parametrize(
    "world, ring, micro, stage, checkpointing",
    [
        (1, 1, 1, 0, False),
        (2, 2, 2, 1, True),
        (2, 1, 2, 2, False),
        pytest.param(4, 2, 1, 3, True, marks=pytest.mark.deep),
        (4, 4, 4, 2, False),
    ],
)
def test_losses_do_not_depend_on_the_ranks(
    truth: list[float], world: int, ring: int, micro: int, stage: int, checkpointing: bool
) -> None:
    for losses in run_ranks(world, worker, ring, micro, stage, checkpointing):
        torch.testing.assert_close(losses, truth, rtol=tolerance("training loss"), atol=0)


def test_seeds_differ_by_run_step_and_row() -> None:
    seeds = torch.cat([row_seeds(run, step, 0, 8) for run in range(4) for step in range(8)])
    assert seeds.dtype == torch.int64 and len(set(seeds.tolist())) == len(seeds)
    assert torch.equal(row_seeds(1, 2, 0, 8)[3:], row_seeds(1, 2, 3, 5))
    assert row_seeds(-1, 0, 0, 1).shape == (1,)
