"""Cottention's exchange is under way while a rank computes, forward and backward: seen by a link that takes notes."""

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
    """A link whose messages take a while, and a diary of its rank."""

    def __init__(self, link: Link, diary: list[str]) -> None:
        self.ring, self.rank, self._link, self._diary = link.ring, link.rank, link, diary

    def exchange(self, sends: list[Message], receives: list[Message]) -> Pending:
        self._diary.append("start")
        return _Slow(self._link.exchange(sends, receives), self._diary, time.monotonic() + DELAY)


class _Slow:
    def __init__(self, pending: Pending, diary: list[str], arrival: float) -> None:
        self._pending, self._diary, self._arrival = pending, diary, arrival

    def wait(self) -> None:
        time.sleep(max(self._arrival - time.monotonic(), 0.0))
        self._diary.append("end")
        self._pending.wait()


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", ["cosine value", "cosine query"])
def test_a_rank_computes_while_states_travel(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ring, length = 3, 96
    leaves, weight = ranks.inputs(name, length)
    expected = ranks.one_device(name, leaves, weight, None)
    parts = ranks.indices(layout, ring, length)
    diaries: dict[int, list[str]] = {}
    for method in ("forward", "backward"):
        plain = getattr(cosine_chunks._CosineWalk, method)

        def noted(*arguments: object, plain: object = plain, method: str = method) -> object:
            if (diary := diaries.get(threading.get_ident())) is not None:
                diary.append(method)
            return plain(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(cosine_chunks._CosineWalk, method, noted)

    def worker(link: Link) -> tuple[ranks.Answer, list[str]]:
        diary = diaries[threading.get_ident()] = []
        slow = Slow(link, diary)

        def run(mine: list[torch.Tensor], ids: torch.Tensor | None) -> torch.Tensor:
            return ranks.call(name, mine, ids, layout, slow)

        return ranks.local_answer(name, leaves, weight, None, parts[link.rank], run), diary

    results, _ = simulate.run(ring, worker)
    found = ranks.assemble(name, [answer for answer, _ in results], torch.cat(parts).argsort())
    assert max(direct.differences(found, expected)) <= tolerance("fp64")
    for _, diary in results:
        first, last = diary.index("end"), len(diary) - 1 - diary[::-1].index("start")
        assert diary[: first + 1] == ["start", "forward", "end"], diary
        assert diary[last:] == ["start", "backward", "end"], diary
        assert diary.count("start") == diary.count("end") == 2
