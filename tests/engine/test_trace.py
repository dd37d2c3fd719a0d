"""Under ZeRO-3 a forward pass before the first step does not make every later step gather weights twice."""

from __future__ import annotations

from typing import Any

from engine_tiny import make_engine, ragged_rows, run_ranks, run_window


def numbers_gathered(rank: int, world: int) -> tuple[int, int]:
    """Return how many numbers the fourth step gathers, and how many are partitioned."""
    engine = make_engine(2, 3)
    engine.evaluate([ragged_rows(7, 0, 0)])
    coordinator: Any = engine.optimizer.parameter_offload.get_param_coordinator()
    name, gathered = "_PartitionedParameterCoordinator__all_gather_params", 0
    gather = getattr(coordinator, name)

    def count(parameters: Any, forward: bool) -> None:
        nonlocal gathered
        gathered += sum(parameter.ds_numel for parameter in parameters)
        gather(parameters, forward)

    setattr(coordinator, name, count)
    for step in range(4):
        gathered = 0
        run_window(engine, [ragged_rows(step, 0, 0)])
    partitioned = sum(p.ds_numel for p in engine.module.parameters() if not p.ds_persist)
    engine.destroy()
    return gathered, partitioned


def test_each_weight_is_gathered_once_a_step() -> None:
    for gathered, partitioned in run_ranks(2, numbers_gathered):
        assert gathered == partitioned > 0
