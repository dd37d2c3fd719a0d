"""Simulated ranks pass on messages, results and errors as processes do."""

from __future__ import annotations

import queue

import pytest
import torch

from longctx.attention import simulate
from longctx.attention.comm import GRADIENT, KV, Link, Message, Packet
from longctx.attention.hybrid.ulysses import UlyssesGroup


def packet(value: float) -> Packet:
    made = Packet((torch.empty(2),), torch.float32)
    made.buffer.view(torch.float32).fill_(value)
    return made


def pass_on(link: Link, kind: int = GRADIENT) -> float:
    """Send this rank's number to the next rank; return the number received."""
    arriving = packet(-1)
    sends = [Message((link.rank + 1) % link.ring, packet(link.rank), kind)]
    link.exchange(sends, [Message((link.rank - 1) % link.ring, arriving, kind)]).wait()
    return float(arriving.buffer.view(torch.float32)[0])


def test_every_rank_receives_its_neighbours_number() -> None:
    results, counters = simulate.run(5, pass_on)
    assert results == [4.0, 0.0, 1.0, 2.0, 3.0]
    assert all((c.gradient_hops, c.messages, c.bytes) == (1, 1, 8) for c in counters)


def test_a_grid_is_rings_of_equal_ulysses_rank_and_groups_of_equal_ring_rank() -> None:
    def worker(link: Link, group: UlyssesGroup) -> tuple[float, list[int]]:
        sent = torch.full((group.size,), link.rank * group.size + group.rank, dtype=torch.uint8)
        received, ones = torch.empty_like(sent), [1] * group.size
        group.all_to_all(sent, ones, received, ones)
        return pass_on(link), received.tolist()

    results, _ = simulate.run_grid(2, 3, worker)
    assert results == [(1.0, [0, 1, 2])] * 3 + [(0.0, [3, 4, 5])] * 3


def test_a_message_that_is_not_received_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no rank received"):
        simulate.run(2, lambda link: link.exchange([Message(1 - link.rank, packet(0), GRADIENT)], []).wait())


def test_a_message_that_is_not_sent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "TIMEOUT", 0.1)
    with pytest.raises(queue.Empty):
        simulate.run(2, lambda link: link.exchange([], [Message(1 - link.rank, packet(0), KV)]).wait())
