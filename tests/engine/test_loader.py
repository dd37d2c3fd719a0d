"""``training_data=``: the same samples in the same order on any mesh, and exact resumption."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_tiny import make_optimizer, run_ranks, tiny_llama

from longctx.errors import EngineError

from tolerances import tolerance


class Rows:
    """A map-style dataset whose rows say their own number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return {"input_ids": [index] * 8, "labels": [index] * 8}


def loaded(rank: int, world: int, ring: int) -> Any:
    import longctx

    model = tiny_llama()
    config = {
        "train_batch_size": 4, "gradient_accumulation_steps": 2, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 5000},
    }  # fmt: skip
    optimizer = make_optimizer("sgd", model.parameters())
    mesh = longctx.Mesh(ring=ring)
    engine, _, loader, _ = longctx.initialize(model, config, mesh, optimizer=optimizer, training_data=Rows(18), seed=7)
    assert loader is not None and len(loader) == 4

    def numbers(window: list[Any]) -> list[list[int]]:
        return [batch["input_ids"][:, 0].tolist() for batch in window]

    first = [numbers(window) for window in loader]
    losses = []
    for window in loader:  # the next epoch: another order
        for batch in window:
            engine.backward(engine(**batch).loss)
            engine.step()
        losses.append(engine.global_loss)
        if len(losses) == 2:
            break
    state = loader.state_dict()
    rest = [numbers(window) for window in loader]
    loader.load_state_dict(state)
    again = [numbers(window) for window in loader]
    with pytest.raises(EngineError, match="18 rows|3 rows"):
        type(loader)(Rows(3), engine)
    with pytest.raises(EngineError, match="map-style"):
        type(loader)(iter([]), engine)
    engine.set_train_batch_size(4 * engine.gradient_accumulation_steps())
    with pytest.raises(EngineError, match="train_batch_size has been set to 8"):
        next(iter(loader))
    engine.destroy()
    return mesh.data_rank, first, rest == again, state, losses


def test_training_data_is_dealt_out_alike_on_any_mesh() -> None:
    orders, losses = [], []
    for world, ring in ((2, 2), (4, 2), (2, 1)):
        results = run_ranks(world, loaded, ring)
        replicas = {data_rank: first for data_rank, first, *_ in results}
        steps = [
            sorted(row for first in replicas.values() for part in first[step] for row in part) for step in range(4)
        ]
        assert len({row for step in steps for row in step}) == 16  # no row twice in an epoch
        orders.append(steps)
        losses.append(results[0][4])
        assert all(resumed and state == {"seed": 7, "consumed": 24} for _, _, resumed, state, _ in results)
    assert orders[0] == orders[1] == orders[2]
    torch.testing.assert_close(losses[1:], [losses[0]] * 2, rtol=tolerance("training loss"), atol=0)
