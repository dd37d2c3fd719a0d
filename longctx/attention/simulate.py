"""A whole ring inside one process, one thread per rank: the real passes and schedule, with messages through a mailbox.

For tests and for rings larger than the machine: `run(64, worker)` replaces 64 processes.
"""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from longctx.attention.comm import Counters, Link, Message, Pending, count
from longctx.attention.hybrid.ulysses import UlyssesGroup, count_exchange

TIMEOUT = 60.0
"""Seconds to wait for a message: a schedule in which a rank waits for a message never sent must fail, not hang."""


class Mailbox:
    """Messages in transit between simulated ranks, in order for each (sender, receiver, kind)."""

    def __init__(self) -> None:
        self._boxes: dict[tuple[int, int, int], queue.Queue[list[torch.Tensor]]] = defaultdict(queue.Queue)
        self._lock = threading.Lock()

    def box(self, sender: int, receiver: int, kind: int) -> queue.Queue[list[torch.Tensor]]:
        with self._lock:
            return self._boxes[sender, receiver, kind]

    @property
    def empty(self) -> bool:
        """Whether all that was sent has been received."""
        return all(box.empty() for box in self._boxes.values())


class SimulatedLink:
    """One simulated rank's end of the ring, with counters of its own."""

    def __init__(self, mailbox: Mailbox, ring: int, rank: int) -> None:
        self.ring, self.rank, self.counters, self._mailbox = ring, rank, Counters(), mailbox

    def exchange(self, sends: list[Message], receives: list[Message]) -> Pending:
        count(sends, self.counters)
        for message in sends:
            self._mailbox.box(self.rank, message.peer, message.kind).put([x.clone() for x in message.tensors])
        return _Waiting([(self._mailbox.box(m.peer, self.rank, m.kind), m) for m in receives])


class _Waiting:
    def __init__(self, receives: list[tuple[queue.Queue[list[torch.Tensor]], Message]]) -> None:
        self._receives = receives

    def wait(self) -> None:
        for box, message in self._receives:
            for ours, theirs in zip(message.tensors, box.get(timeout=TIMEOUT), strict=True):
                ours.copy_(theirs)


class SimulatedUlyssesGroup:
    """One simulated rank's end of a ulysses group, with counters of its own."""

    def __init__(self, mailbox: Mailbox, size: int, rank: int, counters: Counters) -> None:
        self.size, self.rank, self._mailbox, self._counters = size, rank, mailbox, counters

    def all_to_all(
        self, sent: torch.Tensor, send_sizes: list[int], received: torch.Tensor, receive_sizes: list[int]
    ) -> None:
        count_exchange(self.rank, send_sizes, self._counters)
        for peer, piece in enumerate(sent.split(send_sizes)):
            self._mailbox.box(self.rank, peer, 0).put([piece.clone()])
        for peer, piece in enumerate(received.split(receive_sizes)):
            piece.copy_(self._mailbox.box(peer, self.rank, 0).get(timeout=TIMEOUT)[0])


def run_grid(ring: int, ulysses: int, worker: Callable[[Link, UlyssesGroup], Any]) -> tuple[list[Any], list[Counters]]:
    """Call `worker(link, group)` for every rank of ring x ulysses at once; return as `run` does, in mesh order."""
    rings = [Mailbox() for _ in range(ulysses)]
    groups = [Mailbox() for _ in range(ring)]
    links = [SimulatedLink(rings[u], ring, r) for r in range(ring) for u in range(ulysses)]
    ends = [
        SimulatedUlyssesGroup(groups[i // ulysses], ulysses, i % ulysses, links[i].counters) for i in range(len(links))
    ]
    return _together(links, lambda i: worker(links[i], ends[i]), [*rings, *groups])


def run(ring: int, worker: Callable[[Link], Any]) -> tuple[list[Any], list[Counters]]:
    """Call `worker(link)` for every rank of a ring at once; return (results, counters), each a list by rank.

    Raises:
        RuntimeError: a message was sent and not received.
        queue.Empty: a rank waited for a message that was not sent.
    """
    mailbox = Mailbox()
    links = [SimulatedLink(mailbox, ring, rank) for rank in range(ring)]
    return _together(links, lambda rank: worker(links[rank]), [mailbox])


def _together(
    links: list[SimulatedLink], call: Callable[[int], Any], mailboxes: list[Mailbox]
) -> tuple[list[Any], list[Counters]]:
    """Run call(0), call(1), ... at once."""
    with ThreadPoolExecutor(len(links)) as pool:
        results = [future.result() for future in [pool.submit(call, rank) for rank in range(len(links))]]
    if not all(mailbox.empty for mailbox in mailboxes):
        raise RuntimeError("a message was sent that no rank received")
    return results, [link.counters for link in links]
