"""Evaluation under unequal numbers of batches equals one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from engine_tiny import make_engine, ragged_rows, run_ranks, run_window, tiny_llama, unsharded_loss

from longctx.errors import EngineError

from tolerances import tolerance


def evaluated(rank: int, world: int, stage: int, counts: list[int]) -> Any:
    import longctx.engine.step.window as window

    engine = make_engine(2, stage)
    engine.module.model.layers[0].eval()  # frozen, say
    modes = [module.training for module in engine.module.modules()]
    replica = engine.mesh.data_rank
    batches = [ragged_rows(5, index, replica) for index in range(counts[replica])]
    whole = engine.evaluate(batches)
    parts = engine.evaluate((window.shard_rows(b, engine.mesh, engine.layout) for b in batches), sharded=True)
    assert modes == [module.training for module in engine.module.modules()] and parts == whole
    assert math.isnan(engine.evaluate([]).loss)
    missing = {key: value for key, value in ragged_rows(0, 0, 0).items() if key != "labels"}
    with pytest.raises(EngineError) as error:
        engine.evaluate([missing] if rank == 0 else [ragged_rows(0, 0, 0)])
    run_window(engine, [ragged_rows(0, 0, replica)])  # and training goes on
    engine.destroy()
    return whole, str(error.value)


def different(rank: int, world: int) -> list[str]:
    """Rank 1 of the ring passes other rows, or one batch more."""
    engine = make_engine(2, 1)
    messages = []
    for batches in ([ragged_rows(5, rank, 0)], [ragged_rows(5, 0, 0)] * (1 + rank)):
        with pytest.raises(EngineError) as error:
            engine.evaluate(batches)
        messages.append(str(error.value))
    engine.destroy()
    return messages


def test_a_ring_evaluates_the_same_rows() -> None:
    for rows, numbers in run_ranks(2, different):
        assert "different rows in evaluation batches" in rows and "different numbers of evaluation" in numbers


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("counts", [[3, 1], [0, 2]])
def test_evaluation_with_unequal_numbers_of_batches(stage: int, counts: list[int]) -> None:
    model = tiny_llama()
    with torch.no_grad():
        sums = [unsharded_loss(model, ragged_rows(5, index, r)) for r in range(2) for index in range(counts[r])]
    loss, tokens = sum(float(total) for total, _ in sums), sum(count for _, count in sums)
    for rank, (found, message) in enumerate(run_ranks(4, evaluated, stage, counts)):
        assert found.tokens == tokens
        assert found.loss == pytest.approx(loss / tokens, rel=tolerance("training loss"))
        assert ("needs labels" in message) if rank == 0 else ("ranks [0]" in message)
