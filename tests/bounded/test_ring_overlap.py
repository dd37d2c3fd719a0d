"""Cottention's exchange overlaps with computation, forward and backward; a slow link records the order of events."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from bounded import direct, ranks

from longctx.attention import simulate
from longctx.attention.comm import Link, Message, Pending
from longctx.bounded.cosine import chunks as cosine_chunks

from tolerances import tolerance

DELAY = 0.05


class Slow:
    """A link whose messages arrive with a delay, and a log of its rank's events."""

    def __init__(self, link: Link, log: list[str]) -> None:
        self.ring, self.rank, self._link, self._log = link.ring, link.rank, link, log

    def exchange(self, sends: list[Message], receives: list[Message]) -> Pending:
        self._log.append("start")
        return _Slow(self._link.exchange(sends, receives), self._log, time.monotonic() + DELAY)


class _Slow:
    def __init__(self, pending: Pending, log: list[str], arrival: float) -> None:
        self._pending, self._log, self._arrival = pending, log, arrival

    def wait(self) -> None:
        time.sleep(max(self._arrival - time.monotonic(), 0.0))
        self._log.append("end")
        self._pending.wait()


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", ["cosine value", "cosine query"])
def test_a_rank_computes_while_states_are_in_flight(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ring, length = 3, 96
    leaves, weight = ranks.inputs(name, length)
    expected = ranks.one_device(name, leaves, weight, None)
    parts = ranks.indices(layout, ring, length)
    logs: dict[int, list[str]] = {}
    for method in ("forward", "backward"):
        plain = getattr(cosine_chunks._CosineWalk, method)

        def noted(*arguments: object, plain: object = plain, method: str = method) -> object:
            if (log := logs.get(threading.get_ident())) is not None:
                log.append(method)
            return plain(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(cosine_chunks._CosineWalk, method, noted)

    def worker(link: Link) -> tuple[ranks.Answer, list[str]]:
        log = logs[threading.get_ident()] = []
        slow = Slow(link, log)

        def run(mine: list[torch.Tensor], ids: torch.Tensor | None) -> torch.Tensor:
            return ranks.call(name, mine, ids, layout, slow)

        return ranks.local_answer(name, leaves, weight, None, parts[link.rank], run), log

    results, _ = simulate.run(ring, worker)
    found = ranks.assemble(name, [answer for answer, _ in results], torch.cat(parts).argsort())
    assert max(direct.differences(found, expected)) <= tolerance("fp64")
    for _, log in results:
        first, last = log.index("end"), len(log) - 1 - log[::-1].index("start")
        assert log[: first + 1] == ["start", "forward", "end"], log
        assert log[last:] == ["start", "backward", "end"], log
        assert log.count("start") == log.count("end") == 2
