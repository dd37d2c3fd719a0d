"""Exclusive scan of an associative state over the stretches of a sequence on several ranks, with autograd.

Every stretch (consecutive tokens on one rank; two per rank with zigzag) has a state. Each receives the combination of
the states of all stretches before it (or after it), in the order of the sequence. There are two forms with equal
results, chosen by the sizes of ring and state:

    gather   every rank sends its states to all later ranks: one stage, up to R - 1 messages per rank
    steps    Hillis and Steele's scan: ceil(log2 R) + 1 stages of one message per rank; zigzag needs two such passes

A state is a tuple of tensors; integer ones (document ids) have no gradient. Backward sends gradients along the reversed
routes at the same cost. Bytes do not depend on the length of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from longctx.attention.comm import Link
from longctx.bounded.ranks.exchange import Operation, StretchMap, Value, begin, collect, one_per_rank, shift
from longctx.errors import AttentionError
from longctx.layout import Layout, get_layout

_GATHER_RING = 8
_GATHER_BYTES = 64 << 20


def map_stretches(layout: str | Layout, ring: int) -> StretchMap:
    """Return which rank holds which stretches in a layout.

    Raises:
        AttentionError: the layout interleaves tokens, so no rank holds consecutive tokens.
    """
    layout = get_layout(layout)
    spans = [layout.spans(rank, ring, layout.multiple(ring)) for rank in range(ring)]
    if any(span.stride > 1 for here in spans for span in here):
        raise AttentionError(
            f"layout {layout.name!r} interleaves tokens over the ranks, so a state would have to visit every rank "
            "at every token; a bounded state needs layout 'zigzag' or 'contiguous'"
        )
    return StretchMap(tuple(tuple(span.start for span in here) for here in spans))


def associative_exclusive_scan(
    states: Sequence[Value],
    op: Operation,
    identity: Value,
    link: Link,
    stretches: StretchMap,
    *,
    reverse: bool = False,
    form: str = "auto",
    total: bool = False,
) -> list[Value]:
    """Combine, for every stretch of this rank, the states of all stretches before it.

    Args:
        states: this rank's states, one per stretch, in local order; tuples of tensors with equal shapes on all ranks.
        op: (earlier, later) -> combination; associative, differentiable, and the same on every rank.
        identity: what the first stretch receives; op(identity, x) = x = op(x, identity).
        link: this rank's end of the ring. stretches: which rank holds which stretches.
        reverse: combine the stretches after each stretch instead of those before; op still takes the earlier one first.
        form: "gather", "steps", or "auto".
        total: also return the combination of all stretches on every rank. Each rank then gets all states ("gather"),
            or the last rank's result ("steps").

    Returns:
        A state per stretch of this rank, followed by that of `total`. Differentiable; a collective of all ranks,
        forward and backward.

    Raises:
        AttentionError: the form is unknown.
    """
    return begin_scan(states, op, identity, link, stretches, reverse=reverse, form=form, total=total)()


def begin_scan(
    states: Sequence[Value],
    op: Operation,
    identity: Value,
    link: Link,
    stretches: StretchMap,
    *,
    reverse: bool = False,
    form: str = "auto",
    total: bool = False,
) -> Callable[[], list[Value]]:
    """Start the scan and return a function that finishes it; arguments as of `associative_exclusive_scan`.

    With form "gather", what is computed between the two overlaps with the exchange, in backward as well. Form "steps"
    runs when the result is requested.
    """
    if form not in ("auto", "gather", "steps"):
        raise AttentionError(f"form={form!r} of a scan: use 'auto', 'gather' or 'steps'")
    if form == "auto":
        size = sum(x.numel() * x.element_size() for state in states for x in state)
        form = "gather" if link.ring <= _GATHER_RING or link.ring * size <= _GATHER_BYTES else "steps"
    if reverse:
        op, stretches = _mirrored(op), stretches.reversed()
    if form == "steps" and link.ring > 1:
        return lambda: _by_steps(states, op, identity, link, stretches, total)
    pending = begin(states, link, stretches, lambda source, here: total or source < max(here))

    def finish() -> list[Value]:
        known, token = pending.finish()
        mine = stretches.by_rank[link.rank]
        # The first stretch receives nothing. The token ties it to the exchange, whose backward needs every rank.
        running = _tied(identity, token)
        found = {}
        for stretch in range(stretches.total if total else max(mine) + 1):
            found[stretch] = running
            running = op(running, known[stretch])
        return [found[stretch] for stretch in mine] + ([running] if total else [])

    return finish


def _mirrored(op: Operation) -> Operation:
    return lambda first, second: op(second, first)


def _tied(state: Value, token: torch.Tensor) -> Value:
    return tuple(x + token.to(x.dtype) if x.is_floating_point() else x for x in state)


def _by_steps(
    states: Sequence[Value], op: Operation, identity: Value, link: Link, stretches: StretchMap, total: bool
) -> list[Value]:
    """Scan over the ranks by doubling steps: one pass up the ring for each rank's first stretch in the sequence's
    order, one pass back for its second (zigzag).

    What `inclusive` covers on a ring of 4 with zigzag:

                                 rank 0   rank 1   rank 2   rank 3
        pass 1, own stretch      0        1        2        3
          after step 1           0        0-1      1-2      2-3
          after step 2           0        0-1      0-2      0-3      -> carried: complete on rank 3 alone
          from the rank before   nothing  0        0-1      0-2      -> results
        pass 2, own stretch      7        6        5        0-4      (4 and what was carried)
          after step 1           6-7      5-6      0-5      0-4
          after step 2           0-7      0-6      0-5      0-4
          from the rank after    0-6      0-5      0-4      0-3      -> results (rank 3: carried)
    """
    order = sorted(range(len(states)), key=lambda local: stretches.by_rank[link.rank][local])
    upwards = min(stretches.by_rank[0]) < min(stretches.by_rank[-1])
    results: dict[int, Value] = {}
    # A pass ends on the rank where the next one begins, so only that rank adds what the earlier passes found.
    carried = identity
    for local in order:
        first, sign = (0, 1) if upwards else (link.ring - 1, -1)
        inclusive = op(carried, states[local]) if link.rank == first else states[local]
        step = 1  # after each step, `inclusive` covers twice as many ranks
        while step < link.ring:
            inclusive = op(shift(inclusive, identity, link, sign * step), inclusive)
            step *= 2
        before = shift(inclusive, identity, link, sign)  # exclusive: the inclusive result of the rank before
        results[local] = op(carried, before) if link.rank == first else before
        carried, upwards = inclusive, not upwards
    found = [results[local] for local in range(len(states))]
    if not total:
        return found
    owner = next(rank for rank, here in enumerate(stretches.by_rank) if stretches.total - 1 in here)
    known, token = collect([carried], link, one_per_rank(link.ring), lambda source, here: source == owner)
    return [_tied(state, token) for state in (*found, known[owner])]
