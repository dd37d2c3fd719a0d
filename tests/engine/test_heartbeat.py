"""A frozen rank is named by the others in seconds, with the place where it was last seen and where they wait."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest

from longctx.engine import heartbeat
from longctx.engine.heartbeat import Heartbeat

ROOT = Path(__file__).resolve().parents[2]
LOOP = """
import os, signal, sys, torch, torch.distributed as dist
from longctx.engine import heartbeat
from longctx.mesh import Mesh
dist.init_process_group("gloo")
mesh = Mesh().connect()
heartbeat.start_heartbeat(mesh, 4)
import time; time.sleep(1)
def a_step_of_the_loop():
    if mesh.rank == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(1))
a_step_of_the_loop()
dist.barrier()
"""


def jobs(frozen: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", LOOP, str(frozen)],
            env=os.environ | common | {"RANK": str(rank), "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize("frozen", [1, pytest.param(0, marks=pytest.mark.deep)])
def test_a_stopped_rank_is_named_and_the_job_ends(frozen: int) -> None:
    """Rank 0 keeps the store: where it is frozen, nothing can be asked any more."""
    ranks = jobs(frozen)
    try:
        _, said = ranks[1 - frozen].communicate(timeout=240)
        assert ranks[1 - frozen].returncode == 1
        assert f"longctx: rank {frozen}" in said and "made no sign of life for" in said, said
        assert f"Rank {1 - frozen} waits in its own code" in said
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_ranks_that_end_well_are_not_missed() -> None:
    ranks = jobs(frozen=9)
    for process in ranks:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0 and "sign of life" not in said


def beats(**changes: Any) -> Heartbeat:
    one = Heartbeat(None, 0, 4, 10.0, lambda text: None)
    now = time.monotonic()
    one._answered = one._changed = now
    for name, value in changes.items():
        setattr(one, name, value)
    return one


def test_silence_is_measured_against_the_limit() -> None:
    now = time.monotonic()
    said = json.dumps(["ring attention (passes.py:150)", 3])
    assert beats(_text=said).silence(now + 9) is None
    assert beats(_text=None, _answered=now + 99).silence(now + 99) is None  # it has not begun to beat
    frozen = beats(_text=said, _answered=now + 11).silence(now + 11)
    assert frozen is not None and frozen.startswith("rank 1 made no sign of life for 11 s")
    assert "last seen in ring attention (passes.py:150). Rank 0 waits in " in frozen
    ended = json.dumps([heartbeat.ENDED, 0])
    assert beats(_text=ended, _answered=now + 99).silence(now + 99) is None
    store = beats(_text=said).silence(now + 11)
    assert store is not None and store.startswith("rank 0, which keeps the job's store, made no sign of life")


class Store(dict[str, bytes]):
    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()


def test_a_long_wait_says_where_the_others_are_and_again_only_much_later(capsys: pytest.CaptureFixture[str]) -> None:
    store = Store({heartbeat.KEY + "3": json.dumps(["its own code (user.py:3)", 7]).encode()})
    one = beats(store=store, seconds=0.05)
    for _ in range(3):
        one._note_stall("ring attention (passes.py:150)")
        time.sleep(0.06)
    said = capsys.readouterr().err
    assert said.count("longctx: rank 0 has been in ring attention") == 1
    assert "elsewhere: rank 3 in its own code (user.py:3)" in said


def run(stage: Any, look: Any) -> Any:
    return look()


def backward(call: Any, stage: Any, look: Any) -> Any:
    return call(stage, look)


def test_a_place_is_the_phase_and_the_block_of_the_ring() -> None:
    inner = FunctionType(run.__code__, {"__name__": "longctx.attention.passes"})
    outer = FunctionType(backward.__code__, {"__name__": "longctx.engine.engine"})
    found = outer(inner, SimpleNamespace(source=3), lambda: heartbeat.describe(sys._getframe(1)))
    line = run.__code__.co_firstlineno + 1
    assert found == f"backward, ring attention at the block of ring member 3 (test_heartbeat.py:{line})"
    assert heartbeat.call_site().startswith("its own code (")
