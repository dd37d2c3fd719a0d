"""A model attached to a ring notices that its ranks cut different rows, in loops without ``engine.shard``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_tiny import make_engine, ragged_rows, run_ranks, tiny_llama

from longctx.engine.step import rowcheck
from longctx.errors import EngineError
from longctx.sharding import shard


def cut(rows: dict[str, torch.Tensor], mesh: Any) -> dict[str, Any]:
    documents = torch.zeros_like(rows["input_ids"])
    local = {key: shard(rows[key], mesh) for key in ("input_ids", "position_ids")}
    return {**local, "document_ids": shard(documents, mesh, pad_value=-1), "use_cache": False}


def rows_of(step: int, reader: int) -> dict[str, torch.Tensor]:
    rows = ragged_rows(step, 0, 0)
    rows["input_ids"] = (rows["input_ids"] + reader) % 61
    rows["position_ids"] = torch.arange(rows["input_ids"].shape[1]).expand_as(rows["input_ids"])
    return rows


def foreign(rank: int, world: int, first_wrong: int) -> int:
    """Steps that a loop of another trainer takes before it is stopped: from step ``first_wrong``, ranks read apart."""
    import longctx

    mesh = longctx.Mesh(ring=2)
    model = longctx.attach(tiny_llama(), mesh)
    rowcheck._EVERY = 4
    longctx.shard(torch.zeros(1, 8), mesh)  # not rows
    for step in range(12):
        with torch.no_grad():  # a generation, an evaluation: rows of their own, on any rank
            model(**cut(rows_of(99, 0), mesh))
        batch = cut(rows_of(step, int(rank == 1 and step >= first_wrong)), mesh)
        try:
            model(**batch).logits.sum().backward()
        except EngineError as error:
            assert "ranks [0, 1] share one sequence but gave longctx.shard different rows" in str(error)
            return step
    return 12


@pytest.mark.parametrize(("first_wrong", "stopped"), [(0, 0), (5, 7), (12, 12)])
def test_different_rows_after_attach_are_noticed(first_wrong: int, stopped: int) -> None:
    assert run_ranks(2, foreign, first_wrong) == [stopped, stopped]


def engine_without_shard(rank: int, world: int) -> str:
    engine = make_engine(2, 1)
    with pytest.raises(EngineError) as error:
        engine(**cut(rows_of(0, rank), engine.mesh))
    engine.destroy()
    return str(error.value)


def test_an_engine_notices_too() -> None:
    assert all("gave longctx.shard different rows" in message for message in run_ranks(2, engine_without_shard))
