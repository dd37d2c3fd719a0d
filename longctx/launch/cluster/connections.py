"""The launcher's side of the control connections: which ranks are there, what they said, and which were lost."""

from __future__ import annotations

import hmac
import socket
import sys
import time
from typing import Any, NamedTuple

from longctx.launch.cluster import facts
from longctx.launch.cluster.control import Line, Message, readable
from longctx.launch.cluster.jobspec import JobSpec

SILENT_SECONDS = 2.5  # agents speak every second


class RankEnd(NamedTuple):
    """How a rank ended."""

    code: int
    report: dict[str, Any] | None
    tail: str


class AgentConnection:
    """One rank, seen through its agent."""

    def __init__(self, line: Line, hello: Message, came: float) -> None:
        self.line = line
        self.rank: int = hello["rank"]
        self.facts: dict[str, Any] = hello["facts"]
        self.meeting: tuple[str, int] = (str(hello["address"]), int(hello["port"]))
        self.came = came
        self.end: RankEnd | None = None
        self.lost = ""
        """why it counts as lost; empty while it is there"""


class AgentConnections:
    """All ranks of one job. ``poll`` is to be called again and again."""

    def __init__(self, listener: socket.socket, spec: JobSpec) -> None:
        self.listener, self.spec = listener, spec
        self.by_rank: dict[int, AgentConnection] = {}
        self.endings: list[AgentConnection] = []
        """those that ended badly or were lost, in that order of time"""
        self._strangers: list[Line] = []

    def poll(self, seconds: float = 0.1) -> None:
        """Hear what is said within ``seconds``, keep the connections alive, notice who is gone."""
        lines = {member.line: member for member in self.by_rank.values() if not member.line.closed}
        watched: list[socket.socket | Line] = [self.listener, *lines, *self._strangers]
        for source in readable(watched, seconds):
            if isinstance(source, socket.socket):
                self._strangers.append(Line(self.listener.accept()[0]))
            elif source in lines:
                for message in source.receive():
                    self._hear(lines[source], message)
            else:
                self._greet(source)
        for line, member in lines.items():
            line.keep_alive()
            self._miss(member)

    def send(self, **message: Any) -> None:
        """Tell all ranks."""
        for member in self.by_rank.values():
            member.line.send(**message)

    @property
    def complete(self) -> bool:
        """Whether every rank's agent is there."""
        return len(self.by_rank) == self.spec.world

    @property
    def codes(self) -> list[int]:
        """Exit codes of the ranks that have ended."""
        return [member.end.code for member in self.by_rank.values() if member.end is not None]

    def silent(self) -> list[AgentConnection]:
        """Return those from whom nothing comes although they neither ended nor hung up: a dead host, most likely."""
        found = [one for one in self.by_rank.values() if one.end is None and not one.line.closed]
        found = [one for one in found if one.line.silent_for(SILENT_SECONDS)]
        for one in found:
            one.lost = one.lost or f"nothing was heard from it for {time.monotonic() - one.line.heard:.0f} s"
        return found

    def close(self) -> None:
        """RankEnd all connections: agents then kill what is left of their ranks."""
        for line in [*self._strangers, *(member.line for member in self.by_rank.values())]:
            line.close()

    def _greet(self, line: Line) -> None:
        """Let in an agent that shows our token; anyone else is cut off."""
        messages = line.receive()
        if not messages and not line.closed and not line.silent_for(10):
            return
        self._strangers.remove(line)
        hello = messages[0] if messages else {}
        known = hmac.compare_digest(str(hello.get("token", "")).encode(), self.spec.token.encode())
        rank = hello.get("rank")
        if known and isinstance(rank, int) and 0 <= rank < self.spec.world and rank not in self.by_rank:
            self.by_rank[rank] = AgentConnection(line, hello, time.time())
        else:
            line.close()

    def _hear(self, member: AgentConnection, message: Message) -> None:
        if "console" in message:
            sys.stdout.write(str(message["console"]))
            sys.stdout.flush()
        if "ended" in message and member.end is None:
            member.end = RankEnd(int(message["ended"]), message["report"], str(message["tail"]))
            if member.end.code not in (0, 75):
                self.endings.append(member)

    def _miss(self, member: AgentConnection) -> None:
        if member.lost or member.end is not None:
            return
        if member.line.closed:
            member.lost = "its connection was closed"
        elif member.line.silent_for(self.spec.silence_seconds):
            member.lost = f"nothing was heard from it for {self.spec.silence_seconds} s"
        if member.lost:
            self.endings.append(member)

    def wrong(self, gpus: int) -> dict[str, list[str]]:
        """Return what is wrong with each host that answered, and with where ranks came to run."""
        found: dict[str, list[str]] = {}
        seen: dict[str, tuple[Any, ...]] = {}
        for rank, member in sorted(self.by_rank.items()):
            host, local_rank, count = self.spec.seat(rank)
            place = (member.facts["host"], member.line.socket.getpeername()[0])
            if local_rank == 0:
                seen[host] = place
                found[host] = facts.wrong(member.facts, self.spec, count, gpus, member.came)
            elif seen.get(host, place) != place:
                found[host].append(f"rank {rank} was started on {place[0]} ({place[1]}) instead")
        return {host: problems for host, problems in found.items() if problems}
