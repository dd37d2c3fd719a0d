"""Exchange states between ranks, with autograd: with all ranks that need them at once, or one step along the ring.

Both are collectives of the ring, forward and backward: every rank must enter both, even one that has nothing to send
or to receive.
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


class StretchMap(NamedTuple):
    """Which stretches (consecutive tokens) of the sequence each rank holds, in local order; numbered as in the
    sequence."""

    by_rank: tuple[tuple[int, ...], ...]

    @property
    def total(self) -> int:
        return sum(len(here) for here in self.by_rank)

    def reversed(self) -> StretchMap:
        """Return the map of the same sequence, numbered from its end."""
        return StretchMap(tuple(tuple(self.total - 1 - stretch for stretch in here) for here in self.by_rank))


def one_per_rank(ring: int) -> StretchMap:
    """Return the map of one stretch per rank, in the order of the ranks."""
    return StretchMap(tuple((rank,) for rank in range(ring)))


class PendingStates:
    """States in flight; what is computed before `finish` overlaps with their transfer."""

    def __init__(
        self,
        known: dict[int, Value],
        requested: dict[int, list[int]],
        sent: torch.Tensor,
        transfer: _Transfer | None,
    ) -> None:
        self._known, self._requested, self._sent, self._transfer = known, requested, sent, transfer

    def finish(self) -> tuple[dict[int, Value], torch.Tensor]:
        """Wait for the states.

        Returns:
            {stretch: state}, this rank's own included; and a token, which is 0. Add it to something that the loss
            depends on, so that backward reaches this exchange on every rank.
        """
        if self._transfer is None:
            return self._known, self._sent
        counts = {rank: len(stretches) for rank, stretches in self._requested.items()}
        token, *received = _Receive.apply(self._transfer, counts, self._sent)
        parts = iter(received)
        for stretches in self._requested.values():
            for stretch in stretches:
                self._known[stretch] = tuple(next(parts) for _ in self._transfer.like)
        return self._known, token


@dataclass
class _Transfer:
    """What `_Send` and `_Receive` of one exchange share: shapes of a state, gradients to come back, the messages.

    `_Receive` takes `_Send`'s output as an input, so autograd runs `_Receive.backward`, which starts the exchange of
    gradients, before `_Send.backward`, which waits for it; what forward computed between the two is in between again.
    """

    link: Link
    like: list[torch.Tensor]
    back: dict[int, list[torch.Tensor]]
    exchange: Exchange | None = None

    def wait(self) -> dict[int, list[torch.Tensor]]:
        exchange, self.exchange = self.exchange, None
        assert exchange is not None
        return exchange.wait()


def begin(
    states: Sequence[Value], link: Link, stretches: StretchMap, needed: Callable[[int, tuple[int, ...]], bool]
) -> PendingStates:
    """Start to fetch every stretch's state for which `needed(stretch, stretches of the receiving rank)` holds.

    All ranks pass the same rule. In backward the exchange of gradients starts at `finish` and ends here, so it overlaps
    with the backward of what forward computed in between.
    """
    here = stretches.by_rank[link.rank]
    others = [rank for rank in range(link.ring) if rank != link.rank]
    requested = {rank: [c for c in stretches.by_rank[rank] if needed(c, here)] for rank in others}
    given = {rank: [i for i, c in enumerate(here) if needed(c, stretches.by_rank[rank])] for rank in others}
    known = dict(zip(here, states, strict=True))
    flat = [x for state in states for x in state]
    if link.ring == 1:
        return PendingStates(known, requested, torch.zeros((), device=flat[0].device), None)
    like = [x.detach() for x in states[0]]
    real = [x for x in like if x.is_floating_point()]
    transfer = _Transfer(link, like, {rank: real * len(some) for rank, some in given.items() if some})
    sent = _Send.apply(transfer, {rank: len(some) for rank, some in requested.items()}, given, *flat)
    return PendingStates(known, requested, sent, transfer)


def collect(
    states: Sequence[Value], link: Link, stretches: StretchMap, needed: Callable[[int, tuple[int, ...]], bool]
) -> tuple[dict[int, Value], torch.Tensor]:
    """Call `begin` and `finish` at once."""
    return begin(states, link, stretches, needed).finish()


def shift(state: Value, identity: Value, link: Link, by: int) -> Value:
    """Return the state of the rank `by` places before this one; `identity` where there is none."""
    return _Shift.apply(link, by, len(state), *state, *identity)


class Exchange:
    """Send `give[rank]` to each rank and receive tensors shaped like `like[rank]`: one message per pair of ranks."""

    def __init__(self, link: Link, give: dict[int, list[torch.Tensor]], like: dict[int, list[torch.Tensor]]) -> None:
        sends, self._receives = [], []
        for rank, tensors in give.items():
            packet = Packet(tensors)
            for buffer, x in zip(packet.parts, tensors, strict=True):
                assert buffer is not None
                buffer.copy_(x)
            sends.append(Message(rank, packet, STATE))
        for rank, tensors in like.items():
            self._receives.append(Message(rank, Packet(tensors), STATE))
        self._sends, self._pending = sends, link.exchange(sends, self._receives)  # buffers must outlive the sends

    def wait(self) -> dict[int, list[torch.Tensor]]:
        """Return what has been received, by rank."""
        self._pending.wait()
        return {message.peer: [x for x in message.packet.parts if x is not None] for message in self._receives}


@first_only
class _Send(torch.autograd.Function):
    """Send states in forward; wait for their gradients in backward."""

    @staticmethod
    def forward(
        ctx: Any, transfer: _Transfer, requested: dict[int, int], given: dict[int, list[int]], *flat: torch.Tensor
    ) -> torch.Tensor:
        ctx.transfer, ctx.given, ctx.like = transfer, given, [x.detach() for x in flat]
        per = len(transfer.like)
        give = {rank: [x for i in some for x in flat[i * per : (i + 1) * per]] for rank, some in given.items() if some}
        like = {rank: transfer.like * count for rank, count in requested.items() if count}
        transfer.exchange = Exchange(transfer.link, give, like)
        return torch.zeros((), device=flat[0].device)

    @staticmethod
    def backward(ctx: Any, _: Any) -> Any:
        totals = [torch.zeros_like(x) if x.is_floating_point() else None for x in ctx.like]
        per = len(ctx.transfer.like)
        for rank, tensors in ctx.transfer.wait().items():
            arrived = iter(tensors)
            for i in ctx.given[rank]:
                for total in totals[i * per : (i + 1) * per]:
                    if total is not None:
                        total += next(arrived)
        return None, None, None, *totals


@first_only
class _Receive(torch.autograd.Function):
    """Wait for states in forward; send their gradients in backward."""

    @staticmethod
    def forward(
        ctx: Any, transfer: _Transfer, requested: dict[int, int], sent: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.transfer, ctx.requested = transfer, requested
        # Clone: if one function returned views of one buffer, autograd would take them for each other's views.
        received = [x.clone() for tensors in transfer.wait().values() for x in tensors]
        ctx.mark_non_differentiable(*(x for x in received if not x.is_floating_point()))
        ctx.set_materialize_grads(False)
        return sent.clone(), *received

    @staticmethod
    def backward(ctx: Any, _: Any, *gradients: torch.Tensor | None) -> Any:
        transfer, found = ctx.transfer, iter(gradients)
        give: dict[int, list[torch.Tensor]] = {}
        for rank, number in ctx.requested.items():
            for x in transfer.like * number:
                gradient = next(found)
                if x.is_floating_point():
                    give.setdefault(rank, []).append(torch.zeros_like(x) if gradient is None else gradient)
        transfer.exchange = Exchange(transfer.link, give, transfer.back)
        return None, None, torch.zeros((), device=transfer.like[0].device)


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
        received = tuple(x.clone() for x in Exchange(link, give, like).wait().get(source, identity))
        ctx.mark_non_differentiable(*(x for x in received if not x.is_floating_point()))
        ctx.set_materialize_grads(False)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        pairs = [(g, x) for g, x in zip(gradients, ctx.like, strict=True) if x.is_floating_point()]
        filled = [torch.zeros_like(x) if g is None else g for g, x in pairs]
        give = {ctx.source: filled} if 0 <= ctx.source < ctx.link.ring else {}
        wanted = {ctx.target: [x for _, x in pairs]} if 0 <= ctx.target < ctx.link.ring else {}
        arrived = iter(Exchange(ctx.link, give, wanted).wait().get(ctx.target, []))
        back = [next(arrived, None) if x.is_floating_point() else None for x in ctx.like]
        return None, None, None, *back, *(None for _ in back)
