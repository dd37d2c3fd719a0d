"""Forward and backward of one rank of a ring: in each stage of the schedule, compute while messages travel.

They know nothing of processes: a `Link` connects processes, or threads that simulate ranks, or nothing (a ring of one).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from longctx.attention import sink as sinks
from longctx.attention.backends.base import Backend, BackwardQueries, KeyBlock, StepGradients
from longctx.attention.band import Rule
from longctx.attention.comm import GRADIENT, HOME, KV, Link, Message, Packet
from longctx.attention.mask import BlockMask
from longctx.attention.schedule import Schedule, Stage, make_schedule
from longctx.attention.scores import Scores
from longctx.layout import Span, get_layout

Pair = tuple[torch.Tensor, torch.Tensor]


class KeyValueBuffer:
    """The block of keys and values that this rank computes with, and the one it is receiving (double buffering).

    k (B, G, T, Dk), v (B, G, T, Dv), documents (B, T) or None; every block of a ring has these shapes and dtypes.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None) -> None:
        self._own = (k, v, documents)
        self._here: Packet | None = None
        self._next: Packet | None = None

    def messages(self, stage: Stage) -> tuple[list[Message], list[Message]]:
        """Return what a stage sends and receives of keys and values, and allocate the receive buffer."""
        sends, receives = [], []
        if stage.kv_to is not None:
            packet = Packet.lend(self._own) if stage.chain_begins else self._here
            assert packet is not None
            sends.append(Message(stage.kv_to, packet, KV, stage.chain_begins))
        if stage.kv_from is not None:
            self._next = Packet(self._own)
            receives.append(Message(stage.kv_from, self._next, KV, stage.chain_begins))
        return sends, receives

    def tensors(self, own: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return (k, v, document ids) of this rank's own block or of the visiting one."""
        k, v, documents = self._own if own or self._here is None else self._here.parts
        assert k is not None and v is not None
        return k, v, documents

    def arrive(self) -> None:
        """Replace the block by the received one; the previous one is freed."""
        self._here, self._next = self._next, None


class Gradients:
    """dK and dV of the blocks that visit this rank, and of its own block.

    A block's gradient follows the block one stage behind: while this rank computes its part, the sum of the earlier
    ranks' parts arrives. The two are added, and the sum leaves in the next stage, to the next rank or to the block's
    home. This rank's part of its own block waits here for the others' sum; in a closed ring it travels round instead.

    Each is a pair (dk (B, G, T, Dk), dv (B, G, T, Dv)) in `dtype`, the accumulator's.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> None:
        self._like, self._dtype = (k, v), dtype
        self._home: Packet | None = None
        self._part: Packet | None = None  # this rank's part for the visiting block
        self._leaving: Packet | None = None  # the sum for the previous stage's block, to be sent

    def messages(
        self, stage: Stage, sends: list[Message], receives: list[Message]
    ) -> tuple[Packet | None, Packet | None]:
        """Append a stage's messages; return the buffers of (the earlier ranks' sum, the own block's finished sum)."""
        if stage.grad_to is not None:
            assert self._leaving is not None
            sends.append(Message(stage.grad_to, self._leaving, HOME if stage.grad_home else GRADIENT))
        arriving: list[Packet | None] = []
        for peer, kind in ((stage.grad_from, GRADIENT), (stage.home_from, HOME)):
            packet = None if peer is None else Packet(self._like, self._dtype)
            if peer is not None and packet is not None:
                receives.append(Message(peer, packet, kind))
            arriving.append(packet)
        return arriving[0], arriving[1]

    def allocate(self, stage: Stage) -> Pair:
        """Allocate (dk, dv) for this rank's part of the stage's block."""
        if stage.source is None:
            return self._like
        part = Packet(self._like, self._dtype)
        if stage.grad_stays:
            self._home = part
        else:
            self._part = part
        return part.gradients()

    def accumulate(self, partial: Packet | None, finished: Packet | None) -> None:
        """Add what has arrived, the two packets that `messages` returned, to this rank's parts; the stage is over."""
        if partial is not None:
            assert self._part is not None
            self._part.add_(partial)
        if finished is not None:
            if self._home is None:
                self._home = finished
            else:
                self._home.add_(finished)
        self._leaving, self._part = self._part, None

    def finished(self) -> torch.Tensor:
        """Return dk and dv of this rank's own block, complete after the last stage, as one flat tensor: one buffer
        received them."""
        assert self._home is not None
        return self._home.buffer.view(self._dtype).to(self._like[0].dtype)


@dataclass(frozen=True)
class Passes:
    """Forward and backward of one rank. link: its neighbours; layout: which global indices each rank holds; rule: which
    keys each query sees by index; scores: how logits are computed; backend: what computes a step."""

    link: Link
    layout: str
    rule: Rule
    scores: Scores
    backend: Backend

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        documents: torch.Tensor | None,
        sink: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (out in q's dtype, lse) of this rank's queries over the whole ring."""
        buffer = KeyValueBuffer(k, v, documents)
        out, lse, first = sinks.begin(q, v, sink)

        # A function, so that its locals free a stage's buffers. engine/heartbeat.py reads the local `stage` of this and
        # of backward's, to name the block that a rank waits for.
        def run(stage: Stage) -> None:
            nonlocal first
            pending = self.link.exchange(*buffer.messages(stage))  # posted before the computation that hides it
            if stage.compute:
                self.backend.forward_step(q, self._block(buffer, stage, q, documents), out, lse, first)
                first = False
            pending.wait()
            buffer.arrive()

        for stage in self._schedule(q).stages(self.link.rank)[:-1]:  # the last stage moves gradients only
            run(stage)
        if first:  # this rank holds nothing but padding
            out.zero_()
            lse.fill_(-torch.inf)
        return out.to(q.dtype), lse

    def backward(
        self, queries: BackwardQueries, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return (dq, dkv, dalibi) of this rank's tokens: dkv is flat, dk's elements and then dv's; dalibi (H,) is its
        queries' part, None without slopes. All are always computed, so that no rank skips a message."""
        dtype = queries.lse.dtype
        dq = torch.empty(queries.q.shape, dtype=dtype, device=queries.q.device)
        dalibi = None if self.scores.alibi is None else torch.zeros_like(self.scores.alibi, dtype=dtype)
        prepared = self.backend.prepare_backward(queries)
        buffer, gradients, first = KeyValueBuffer(k, v, documents), Gradients(k, v, dtype), True

        def run(stage: Stage) -> None:  # a function, and its local `stage`: as in forward
            nonlocal first
            sends, receives = buffer.messages(stage)
            partial, finished = gradients.messages(stage, sends, receives)
            pending = self.link.exchange(sends, receives)
            part = gradients.allocate(stage)
            if stage.compute:
                block = self._block(buffer, stage, queries.q, documents)
                self.backend.backward_step(prepared, block, StepGradients(dq, *part, dalibi), first)
                first = False
            elif stage.source is not None:  # the block only passes through: this rank adds nothing
                for x in part:
                    x.zero_()
            pending.wait()
            gradients.accumulate(partial, finished)
            buffer.arrive()

        for stage in self._schedule(queries.q).stages(self.link.rank):
            run(stage)
        if first:
            dq.zero_()
        return dq.to(queries.q.dtype), gradients.finished(), dalibi

    def _schedule(self, q: torch.Tensor) -> Schedule:
        return make_schedule(self.layout, self.link.ring, q.shape[2] * self.link.ring, self.rule)

    def _block(self, buffer: KeyValueBuffer, stage: Stage, q: torch.Tensor, documents: torch.Tensor | None) -> KeyBlock:
        """Return the stage's block as this rank's queries see it."""
        rank, source = self.link.rank, stage.source
        assert source is not None
        key, value, ids = buffer.tensors(own=source == rank)
        spans = _spans(self.layout, self.link.ring, q.shape[2])
        return KeyBlock(key, value, BlockMask(spans[rank], spans[source], self.rule, documents, ids), self.scores)


@lru_cache(maxsize=256)
def _spans(layout: str, ring: int, tokens: int) -> tuple[tuple[Span, ...], ...]:
    return tuple(get_layout(layout).spans(rank, ring, tokens * ring) for rank in range(ring))


def split(dkv: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Pair:
    """Return (dk, dv) as views of the dkv that `Passes.backward` returns."""
    dk, dv = dkv.split((k.numel(), v.numel()))
    return dk.view(k.shape), dv.view(v.shape)
