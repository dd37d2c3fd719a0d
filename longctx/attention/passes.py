"""The forward and the backward pass of one rank of a ring: walk the schedule's stages, compute while messages travel.

Knows nothing of processes: a `Link` may be processes, threads that play 64 ranks, or nothing at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from longctx.attention.backends.base import Backend, Rows, accumulator_dtype
from longctx.attention.band import Rule
from longctx.attention.comm import GRADIENT, HOME, KV, Link, Message, Packet
from longctx.attention.mask import BlockMask
from longctx.attention.merge import identity
from longctx.attention.schedule import Schedule, Stage, make_schedule
from longctx.layout import Span, get_layout

Gradients = tuple[torch.Tensor, torch.Tensor]
"""(dk, dv) of one block, in accumulator precision."""


class Visitor:
    """The block of keys and values that is at this rank, and the one on its way."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None) -> None:
        self._own = (k, v, documents)
        self._here: Packet | None = None
        self._next: Packet | None = None

    def messages(self, stage: Stage) -> tuple[list[Message], list[Message]]:
        """What a stage sends and receives of keys and values; the buffer they arrive in is allocated here."""
        sends, receives = [], []
        if stage.kv_to is not None:
            packet = Packet.of(self._own) if stage.kv_own else self._here
            assert packet is not None
            sends.append(Message(stage.kv_to, packet, KV))
        if stage.kv_from is not None:
            self._next = Packet(self._own)
            receives.append(Message(stage.kv_from, self._next, KV))
        return sends, receives

    def tensors(self, own: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(k, v, document ids) of this rank's own block or of the visiting one."""
        k, v, documents = self._own if own or self._here is None else self._here.parts
        assert k is not None and v is not None
        return k, v, documents

    def arrive(self) -> None:
        """The next block is here; the previous one is let go."""
        self._here, self._next = self._next, None


@dataclass(frozen=True)
class Passes:
    """One call's settings on one rank: where it stands, what it may see, who computes."""

    link: Link
    layout: str
    rule: Rule
    scale: float
    backend: Backend

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out in q's dtype, lse) of this rank's queries over the whole ring."""
        out, lse = identity((*q.shape[:3], v.shape[-1]), accumulator_dtype(q.dtype), q.device)
        visitor = Visitor(k, v, documents)
        for stage in self._schedule(q).stages(self.link.rank)[:-1]:
            pending = self.link.exchange(*visitor.messages(stage))
            if stage.compute:
                key, value, mask = self._block(visitor, stage, q, documents)
                self.backend.forward_step(q, key, value, mask, self.scale, out, lse)
            pending.wait()
            visitor.arrive()
        return out.to(q.dtype), lse

    def backward(
        self, rows: Rows, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) of this rank's tokens; all three always, so that no rank leaves the ring early.

        A block's gradient follows it one stage behind: while this rank computes its part, the sum of the earlier ranks'
        parts arrives; the two are added and leave in the next stage.
        """
        dtype = rows.lse.dtype
        dq = _zeros(rows.q, dtype)
        prepared = self.backend.prepare_backward(rows)
        schedule = self._schedule(rows.q)
        carries_home = any(chain.carries_home for chain in schedule.chains)
        visitor = Visitor(k, v, documents)
        home: Gradients | None = None  # of this rank's own block
        leaving: Packet | None = None  # of the previous stage's block
        for index, stage in enumerate(schedule.stages(self.link.rank)):
            sends, receives = visitor.messages(stage)
            if stage.grad_to is not None:
                assert leaving is not None
                sends.append(Message(stage.grad_to, leaving, HOME if stage.grad_home else GRADIENT))
            partial = _expect(receives, stage.grad_from, GRADIENT, k, v, dtype)
            finished = _expect(receives, stage.home_from, HOME, k, v, dtype)
            pending = self.link.exchange(sends, receives)
            part: Packet | None = None
            if stage.source is not None:
                if index == 0 and not carries_home:  # stays here; later parts are added when they come home
                    home = (_zeros(k, dtype), _zeros(v, dtype))
                    target = home
                else:
                    part = Packet((k, v), dtype).zero_()
                    target = part.gradients()
                if stage.compute:
                    key, value, mask = self._block(visitor, stage, rows.q, documents)
                    self.backend.backward_step(prepared, key, value, mask, self.scale, dq, *target)
            pending.wait()
            if partial is not None:
                assert part is not None
                part.add_(partial)
            if finished is not None:
                home = _added(home, finished.gradients())
            leaving = part
            visitor.arrive()
        assert home is not None
        return dq.to(rows.q.dtype), _settled(home[0], k.dtype), _settled(home[1], v.dtype)

    def _schedule(self, q: torch.Tensor) -> Schedule:
        return make_schedule(self.layout, self.link.ring, q.shape[2] * self.link.ring, self.rule)

    def _block(
        self, visitor: Visitor, stage: Stage, q: torch.Tensor, documents: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, BlockMask]:
        """Keys and values of a stage's block, and who of this rank's queries sees whom of them."""
        rank, source = self.link.rank, stage.source
        assert source is not None
        key, value, ids = visitor.tensors(own=source == rank)
        spans = _spans(self.layout, self.link.ring, q.shape[2])
        return key, value, BlockMask(spans[rank], spans[source], self.rule, documents, ids)


@lru_cache(maxsize=256)
def _spans(layout: str, ring: int, tokens: int) -> tuple[tuple[Span, ...], ...]:
    return tuple(get_layout(layout).spans(rank, ring, tokens * ring) for rank in range(ring))


def _zeros(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


def _expect(
    receives: list[Message], peer: int | None, kind: int, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype
) -> Packet | None:
    """Make room for a gradient that arrives in this stage, if one does."""
    if peer is None:
        return None
    packet = Packet((k, v), dtype)
    receives.append(Message(peer, packet, kind))
    return packet


def _added(total: Gradients | None, part: Gradients) -> Gradients:
    if total is None:
        return part
    total[0].add_(part[0])
    total[1].add_(part[1])
    return total


def _settled(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in its final dtype and in memory of its own: an operator's results must not share a packet's buffer."""
    alone = x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x.to(dtype, copy=not alone)
