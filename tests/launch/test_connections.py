"""The launcher's side of the control connections."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_samples import make_spec

from longctx.launch.cluster import control
from longctx.launch.cluster.connections import AgentConnections
from longctx.launch.cluster.control import Line


def poll_until(connections: AgentConnections, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        connections.poll(0.02)


def test_agents_join_by_token_and_are_recorded_when_they_end_or_disconnect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with control.listen("127.0.0.1") as listener:
        connections = AgentConnections(listener, make_spec(tmp_path))
        agents = [Line(socket.create_connection(listener.getsockname())) for _ in range(3)]
        for rank, agent in enumerate(agents):
            agent.send(token="t", rank=rank, facts={}, address="127.0.0.1", port=9)
        poll_until(connections, lambda: connections.complete)
        agents[0].send(console="step 1\n", ended=0, report=None, tail="")
        agents[1].send(ended=3, report={"text": "x"}, tail="")
        poll_until(connections, lambda: len(connections.codes) == 2)
        agents[2].close()
        poll_until(connections, lambda: len(connections.endings) == 2)
        assert sorted(connections.codes) == [0, 3] and capsys.readouterr().out == "step 1\n"
        assert [member.rank for member in connections.endings] == [1, 2]
        assert connections.by_rank[2].lost == "its connection was closed"
        connections.close()
        for agent in agents:
            agent.close()


def test_a_wrong_token_and_a_rank_out_of_range_are_closed(tmp_path: Path) -> None:
    with control.listen("127.0.0.1") as listener:
        connections = AgentConnections(listener, make_spec(tmp_path))
        wrong = [Line(socket.create_connection(listener.getsockname())) for _ in range(2)]
        wrong[0].send(token="other", rank=0)
        wrong[1].send(token="t", rank=7)
        for line in wrong:
            poll_until(connections, lambda line=line: bool(control.readable([line], 0)))
            assert line.receive() == [] and line.closed
        assert not connections.by_rank
