"""Ranks at different places of a loop are stopped by name, and a rank that does not come is named in time."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longctx.engine import exchange as module
from longctx.engine.exchange import exchange
from longctx.errors import EngineError, MeshError
from longctx.mesh import Mesh

from distributed import run_ranks


def elsewhere(rank: int, world: int) -> list[str]:
    mesh = Mesh().connect()
    messages = []
    for at, step in (("engine.evaluate" if rank == 1 else "engine.shard", 3), ("engine.shard", 3 + rank)):
        with pytest.raises(EngineError) as error:
            exchange([rank], mesh, at, step)
        messages.append(str(error.value))
    assert exchange([rank, 7], mesh, "engine.shard", 4) == [[0, 7], [1, 7]]
    return messages


def test_ranks_at_different_places_are_named_on_all() -> None:
    for place, step in run_ranks(2, elsewhere):
        assert "rank 0 in engine.shard after 3 steps; rank 1 in engine.evaluate after 3 steps" in place
        assert "rank 0 in engine.shard after 3 steps; rank 1 in engine.shard after 4 steps" in step


def late(rank: int, world: int) -> tuple[str, float, list[str]]:
    mesh = Mesh(patience=3.0).connect()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(module.__name__).addHandler(handler)
    module._FIRST_WORD = 1.0
    exchange([0], mesh, "engine.shard", 5)
    started, message = time.monotonic(), ""
    try:
        if rank == 1:
            time.sleep(5)
        exchange([0], mesh, "engine.save_checkpoint", 6)
    except EngineError as error:
        message = str(error)
    waited = time.monotonic() - started
    if rank == 0:
        time.sleep(4)  # rank 1's late message has arrived: the ranks are in step again
    module._FIRST_WORD = 60.0
    logging.getLogger(module.__name__).removeHandler(handler)
    return message, waited, said


def test_a_rank_that_does_not_come_is_named_within_the_meshs_patience() -> None:
    (message, waited, said), *_ = run_ranks(2, late)
    assert "engine.save_checkpoint after 6 steps: waited 3 s" in message
    assert "Not here: rank 1, last seen in engine.shard after 5 steps" in message
    assert 2.5 < waited < 30  # neither at once nor at the limit of the group
    assert said and "rank 1, last seen in engine.shard after 5 steps" in said[0]


JOB = """
import os, sys
import torch
import longctx
from engine_tiny import make_engine, ragged_rows
engine = make_engine(2, 1)
mesh = engine.mesh
for step in range(3):
    for batch in engine.shard([ragged_rows(step, 0, 0)]):
        if step == 1 and mesh.rank == 1 and sys.argv[1] == "gone":
            os._exit(0)  # a loop that ends, or a process that is killed
        if step == 1 and mesh.rank == 1:
            mesh.patience = 5.0
            continue  # a micro-batch that one rank alone skips
        engine.backward(engine(**batch).loss)
        engine.step()
"""


@pytest.mark.parametrize(
    "fault", [pytest.param("gone", marks=pytest.mark.deep), pytest.param("skips", marks=pytest.mark.deep)]
)
def test_a_rank_that_is_missed_in_a_message_of_the_model_is_named(fault: str, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(JOB)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    shared |= {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), fault],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=open(tmp_path / f"said-{rank}", "w"),  # noqa: SIM115
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    codes = [rank.wait(timeout=480) for rank in ranks]
    first, second = ((tmp_path / f"said-{rank}").read_text() for rank in range(2))
    assert codes == [1, 0 if fault == "gone" else 1]
    assert "EngineError: engine.forward after 1 steps: a message between ranks failed" in first, first[-2000:]
    assert "rank 1, last seen in engine.shard after 1 steps" in first
    if fault == "skips":
        assert "EngineError: engine.shard after 1 steps: waited 5 s for all ranks" in second, second[-2000:]
        assert "rank 0, last seen in engine.forward after 1 steps" in second


def test_patience_is_a_time() -> None:
    with pytest.raises(MeshError, match="patience=0"):
        Mesh(world_size=1, patience=0)
