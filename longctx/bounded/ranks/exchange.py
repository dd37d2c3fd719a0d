"""States on their way between ranks, with autograd: to all ranks that need them at once, or one step along the ring.

Both are collectives of the ring, forward and backward: each rank enters both, also one that gets or gives nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from longctx.attention.comm import STATE, Link, Message, Packet
from longctx.derivative import first_only

Value = tuple[torch.Tensor, ...]
Operation = Callable[[Value, Value], Value]


class Chain(NamedTuple):
    """Which chunks of the sequence, counted in its order, each rank holds, in local order."""

    chunks: tuple[tuple[int, ...], ...]

    @property
    def total(self) -> int:
        return sum(len(here) for here in self.chunks)

    def reversed(self) -> Chain:
        """The same sequence read from its end."""
        return Chain(tuple(tuple(self.total - 1 - chunk for chunk in here) for here in self.chunks))


def one_each(ring: int) -> Chain:
    """Every rank has one state, in the order of the ranks."""
    return Chain(tuple((rank,) for rank in range(ring)))


class Arriving:
    """States on their way; what is computed before `finish` hides their journey."""

    def __init__(
        self, known: dict[int, Value], asked: dict[int, list[int]], sent: torch.Tensor, trip: _Trip | None
    ) -> None:
        self._known, self._asked, self._sent, self._trip = known, asked, sent, trip

    def finish(self) -> tuple[dict[int, Value], torch.Tensor]:
        """({chunk: state}, this rank's own included; a token). The token is 0: what it is added to takes part in the
        exchange's backward, which every rank must reach."""
        if self._trip is None:
            return self._known, self._sent
        token, *received = _Receive.apply(self._trip, {r: len(c) for r, c in self._asked.items()}, self._sent)
        parts = iter(received)
        for chunks in self._asked.values():
            for chunk in chunks:
                self._known[chunk] = tuple(next(parts) for _ in self._trip.like)
        return self._known, token


@dataclass
class _Trip:
    """What the two ends of an exchange share: a state's shapes, what comes back, and what is under way."""

    link: Link
    like: list[torch.Tensor]
    back: dict[int, list[torch.Tensor]]
    trade: Trade | None = None

    def wait(self) -> dict[int, list[torch.Tensor]]:
        trade, self.trade = self.trade, None
        assert trade is not None
        return trade.wait()


def begin(
    states: Sequence[Value], link: Link, chain: Chain, needed: Callable[[int, tuple[int, ...]], bool]
) -> Arriving:
    """Start to fetch every chunk's state that `needed(chunk, chunks of this rank)`; each rank asks by the same rule.

    In the backward of the whole the gradients' exchange likewise starts at `finish` and ends here, so that it hides
    behind the backward of what forward computed in between.
    """
    here = chain.chunks[link.rank]
    others = [rank for rank in range(link.ring) if rank != link.rank]
    asked = {rank: [c for c in chain.chunks[rank] if needed(c, here)] for rank in others}
    given = {rank: [i for i, c in enumerate(here) if needed(c, chain.chunks[rank])] for rank in others}
    known = dict(zip(here, states, strict=True))
    flat = [x for state in states for x in state]
    if link.ring == 1:
        return Arriving(known, asked, torch.zeros((), device=flat[0].device), None)
    like = [x.detach() for x in states[0]]
    real = [x for x in like if x.is_floating_point()]
    trip = _Trip(link, like, {rank: real * len(some) for rank, some in given.items() if some})
    sent = _Send.apply(trip, {rank: len(chunks) for rank, chunks in asked.items()}, given, *flat)
    return Arriving(known, asked, sent, trip)


def collect(
    states: Sequence[Value], link: Link, chain: Chain, needed: Callable[[int, tuple[int, ...]], bool]
) -> tuple[dict[int, Value], torch.Tensor]:
    """`begin` and `finish` at once."""
    return begin(states, link, chain, needed).finish()


def shift(state: Value, identity: Value, link: Link, by: int) -> Value:
    """The state of the rank `by` places before this one; `identity` where there is none."""
    return _Shift.apply(link, by, len(state), *state, *identity)


class Trade:
    """Send `give[rank]` to its ranks, receive from each rank in `like` tensors of those shapes: one message a pair."""

    def __init__(self, link: Link, give: dict[int, list[torch.Tensor]], like: dict[int, list[torch.Tensor]]) -> None:
        sends, self._receives = [], []
        for rank, tensors in give.items():
            packet = Packet(tensors)
            for place, x in zip(packet.parts, tensors, strict=True):
                assert place is not None
                place.copy_(x)
            sends.append(Message(rank, packet, STATE))
        for rank, tensors in like.items():
            self._receives.append(Message(rank, Packet(tensors), STATE))
        self._sends, self._pending = sends, link.exchange(sends, self._receives)  # buffers live until they have left

    def wait(self) -> dict[int, list[torch.Tensor]]:
        """What has come, by rank."""
        self._pending.wait()
        return {message.peer: [x for x in message.packet.parts if x is not None] for message in self._receives}


@first_only
class _Send(torch.autograd.Function):
    """Forward sends states; backward awaits their gradients."""

    @staticmethod
    def forward(
        ctx: Any, trip: _Trip, asked: dict[int, int], given: dict[int, list[int]], *flat: torch.Tensor
    ) -> torch.Tensor:
        ctx.trip, ctx.given, ctx.like = trip, given, [x.detach() for x in flat]
        per = len(trip.like)
        give = {rank: [x for i in some for x in flat[i * per : (i + 1) * per]] for rank, some in given.items() if some}
        like = {rank: trip.like * count for rank, count in asked.items() if count}
        trip.trade = Trade(trip.link, give, like)
        return torch.zeros((), device=flat[0].device)

    @staticmethod
    def backward(ctx: Any, _: Any) -> Any:
        totals = [torch.zeros_like(x) if x.is_floating_point() else None for x in ctx.like]
        per = len(ctx.trip.like)
        for rank, tensors in ctx.trip.wait().items():
            arrived = iter(tensors)
            for i in ctx.given[rank]:
                for total in totals[i * per : (i + 1) * per]:
                    if total is not None:
                        total += next(arrived)
        return None, None, None, *totals


@first_only
class _Receive(torch.autograd.Function):
    """Forward awaits states; backward sends their gradients."""

    @staticmethod
    def forward(ctx: Any, trip: _Trip, asked: dict[int, int], sent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.trip, ctx.asked = trip, asked
        # Views of one buffer must not be outputs of one function: autograd would take them for each other's views.
        received = [x.clone() for tensors in trip.wait().values() for x in tensors]
        ctx.mark_non_differentiable(*(x for x in received if not x.is_floating_point()))
        ctx.set_materialize_grads(False)
        return sent.clone(), *received

    @staticmethod
    def backward(ctx: Any, _: Any, *gradients: torch.Tensor | None) -> Any:
        trip, found = ctx.trip, iter(gradients)
        give: dict[int, list[torch.Tensor]] = {}
        for rank, number in ctx.asked.items():
            for x in trip.like * number:
                gradient = next(found)
                if x.is_floating_point():
                    give.setdefault(rank, []).append(torch.zeros_like(x) if gradient is None else gradient)
        trip.trade = Trade(trip.link, give, trip.back)
        return None, None, torch.zeros((), device=trip.like[0].device)


@first_only
class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Link, by: int, per: int, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, identity = flat[:per], flat[per:]
        target, source = link.rank + by, link.rank - by
        ctx.link, ctx.target, ctx.source = link, target, source
        ctx.like = [x.detach() for x in state]
        give = {target: list(state)} if 0 <= target < link.ring else {}
        like = {source: list(state)} if 0 <= source < link.ring else {}
        received = tuple(x.clone() for x in Trade(link, give, like).wait().get(source, identity))
        ctx.mark_non_differentiable(*(x for x in received if not x.is_floating_point()))
        ctx.set_materialize_grads(False)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        pairs = [(g, x) for g, x in zip(gradients, ctx.like, strict=True) if x.is_floating_point()]
        filled = [torch.zeros_like(x) if g is None else g for g, x in pairs]
        give = {ctx.source: filled} if 0 <= ctx.source < ctx.link.ring else {}
        wanted = {ctx.target: [x for _, x in pairs]} if 0 <= ctx.target < ctx.link.ring else {}
        arrived = iter(Trade(ctx.link, give, wanted).wait().get(ctx.target, []))
        back = [next(arrived, None) if x.is_floating_point() else None for x in ctx.like]
        return None, None, None, *back, *(None for _ in back)
