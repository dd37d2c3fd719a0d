"""States on their way between ranks, with autograd: to all ranks that need them at once, or one step along the ring.

Both are collectives of the ring, forward and backward: each rank enters both, also one that gets or gives nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from longctx.attention.comm import STATE, Link, Message, Packet

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


def collect(
    states: Sequence[Value], link: Link, chain: Chain, needed: Callable[[int, tuple[int, ...]], bool]
) -> tuple[dict[int, Value], torch.Tensor]:
    """Every chunk's state that `needed(chunk, chunks of this rank)`, in one stage; each rank asks by the same rule.

    Returns:
        ({chunk: state}, this rank's own included; a token). The token is 0: what it is added to takes part in the
        exchange's backward, which every rank must reach.
    """
    here = chain.chunks[link.rank]
    known = dict(zip(here, states, strict=True))
    others = [rank for rank in range(link.ring) if rank != link.rank]
    asked = {rank: [c for c in chain.chunks[rank] if needed(c, here)] for rank in others}
    given = {rank: [i for i, c in enumerate(here) if needed(c, chain.chunks[rank])] for rank in others}
    flat = [x for state in states for x in state]
    if link.ring == 1:
        return known, torch.zeros((), device=flat[0].device)
    token, *received = _Collect.apply(link, {r: len(c) for r, c in asked.items()}, given, len(states[0]), *flat)
    parts = iter(received)
    for rank in others:
        for chunk in asked[rank]:
            known[chunk] = tuple(next(parts) for _ in states[0])
    return known, token


def shift(state: Value, identity: Value, link: Link, by: int) -> Value:
    """The state of the rank `by` places before this one; `identity` where there is none."""
    return _Shift.apply(link, by, len(state), *state, *identity)


def _trade(
    link: Link, give: dict[int, list[torch.Tensor]], like: dict[int, list[torch.Tensor]]
) -> dict[int, list[torch.Tensor]]:
    """Send `give[rank]` to its ranks, receive from each rank in `like` tensors of those shapes: one message a pair."""
    sends, receives = [], []
    for rank, tensors in give.items():
        packet = Packet(tensors)
        for place, x in zip(packet.parts, tensors, strict=True):
            assert place is not None
            place.copy_(x)
        sends.append(Message(rank, packet, STATE))
    for rank, tensors in like.items():
        receives.append(Message(rank, Packet(tensors), STATE))
    link.exchange(sends, receives).wait()
    return {message.peer: [x for x in message.packet.parts if x is not None] for message in receives}


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, link: Link, asked: dict[int, int], given: dict[int, list[int]], per: int, *flat: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.setup = link, asked, given, per
        ctx.like = [x.detach() for x in flat]
        give = {rank: [x for i in some for x in flat[i * per : (i + 1) * per]] for rank, some in given.items() if some}
        like = {rank: list(flat[:per]) * count for rank, count in asked.items() if count}
        # Views of one buffer must not be outputs of one function: autograd would take them for each other's views.
        received = [x.clone() for tensors in _trade(link, give, like).values() for x in tensors]
        ctx.mark_non_differentiable(*(x for x in received if not x.is_floating_point()))
        ctx.set_materialize_grads(False)
        return torch.zeros((), device=flat[0].device), *received

    @staticmethod
    def backward(ctx: Any, _: Any, *gradients: torch.Tensor | None) -> Any:
        link, asked, given, per = ctx.setup
        like, found = ctx.like, iter(gradients)
        give: dict[int, list[torch.Tensor]] = {}
        for rank, number in asked.items():
            for x in like[:per] * number:
                gradient = next(found)
                if x.is_floating_point():
                    give.setdefault(rank, []).append(torch.zeros_like(x) if gradient is None else gradient)
        real = [x for x in like[:per] if x.is_floating_point()]
        wanted = {rank: real * len(some) for rank, some in given.items() if some}
        totals = [torch.zeros_like(x) if x.is_floating_point() else None for x in like]
        for rank, tensors in _trade(link, give, wanted).items():
            arrived = iter(tensors)
            for i in given[rank]:
                for total in totals[i * per : (i + 1) * per]:
                    if total is not None:
                        total += next(arrived)
        return None, None, None, None, *totals


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Link, by: int, per: int, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, identity = flat[:per], flat[per:]
        target, source = link.rank + by, link.rank - by
        ctx.link, ctx.target, ctx.source = link, target, source
        ctx.like = [x.detach() for x in state]
        give = {target: list(state)} if 0 <= target < link.ring else {}
        like = {source: list(state)} if 0 <= source < link.ring else {}
        received = tuple(x.clone() for x in _trade(link, give, like).get(source, identity))
        ctx.mark_non_differentiable(*(x for x in received if not x.is_floating_point()))
        ctx.set_materialize_grads(False)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        pairs = [(g, x) for g, x in zip(gradients, ctx.like, strict=True) if x.is_floating_point()]
        filled = [torch.zeros_like(x) if g is None else g for g, x in pairs]
        give = {ctx.source: filled} if 0 <= ctx.source < ctx.link.ring else {}
        wanted = {ctx.target: [x for _, x in pairs]} if 0 <= ctx.target < ctx.link.ring else {}
        arrived = iter(_trade(ctx.link, give, wanted).get(ctx.target, []))
        back = [next(arrived, None) if x.is_floating_point() else None for x in ctx.like]
        return None, None, None, *back, *(None for _ in back)
