"""The exclusive scan of an associative state over the chunks of a sequence that lies on several ranks, with autograd.

Every chunk of the sequence has a state; each chunk receives the combination of the states of all chunks before it, in
the order of the sequence (or after it). Two forms, equal in result, chosen by the ring's size and the state's:

    gather   every rank sends its states to the ranks that come later: one stage, R - 1 messages a rank at most
    steps    Hillis and Steele's scan: ceil(log2 R) + 1 stages, one message a rank each; zigzag needs two such legs

A state is a tuple of tensors; those that are not floating (document ids) have no gradient. Backward sends gradients the
way the states came, so it costs what forward costs. Bytes do not depend on the length of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from longctx.attention.comm import Link
from longctx.bounded.ranks.exchange import Chain, Operation, Value, begin, collect, one_each, shift
from longctx.errors import AttentionError
from longctx.layout import Layout, get_layout

_GATHER_RING = 8
_GATHER_BYTES = 64 << 20


def chain_of(layout: str | Layout, ring: int) -> Chain:
    """The chunks of a layout whose ranks hold whole stretches of the sequence.

    Raises:
        AttentionError: the layout interleaves tokens, so that no rank holds a stretch that a state could follow.
    """
    layout = get_layout(layout)
    spans = [layout.spans(rank, ring, layout.multiple(ring)) for rank in range(ring)]
    if any(span.stride > 1 for here in spans for span in here):
        raise AttentionError(
            f"layout {layout.name!r} deals single tokens out to the ranks, so a state would have to visit every rank "
            "at every token; a bounded memory needs layout 'zigzag' or 'contiguous'"
        )
    return Chain(tuple(tuple(span.start for span in here) for here in spans))


def associative_exclusive_scan(
    states: Sequence[Value],
    op: Operation,
    identity: Value,
    link: Link,
    chain: Chain,
    *,
    reverse: bool = False,
    form: str = "auto",
    total: bool = False,
) -> list[Value]:
    """Combine, for every chunk of this rank, the states of all chunks before it.

    Args:
        states: this rank's, one a chunk, in local order; tuples of tensors of equal shapes on all ranks.
        op: (earlier, later) -> their combination; associative, differentiable, and the same on every rank.
        identity: what the first chunk receives; op(identity, x) = x = op(x, identity).
        link: this rank's end of the ring. chain: who holds which chunks.
        reverse: combine the chunks after, instead of before; op still takes the earlier one first.
        form: "gather", "steps", or "auto".
        total: also find the combination of all chunks, on every rank: every rank then receives all states, or what the
            last one found.

    Returns:
        a state for every chunk of this rank, and behind them that of `total`. Differentiable; a collective of all
        ranks, forward and backward.

    Raises:
        AttentionError: the form is unknown.
    """
    return begin_scan(states, op, identity, link, chain, reverse=reverse, form=form, total=total)()


def begin_scan(
    states: Sequence[Value],
    op: Operation,
    identity: Value,
    link: Link,
    chain: Chain,
    *,
    reverse: bool = False,
    form: str = "auto",
    total: bool = False,
) -> Callable[[], list[Value]]:
    """Start the scan; what is computed before its result is called for hides the exchange, in backward as well. (Form
    "gather": "steps" begins when it is called for.)"""
    if form not in ("auto", "gather", "steps"):
        raise AttentionError(f"form={form!r} of a scan: use 'auto', 'gather' or 'steps'")
    if form == "auto":
        size = sum(x.numel() * x.element_size() for state in states for x in state)
        form = "gather" if link.ring <= _GATHER_RING or link.ring * size <= _GATHER_BYTES else "steps"
    if reverse:
        op, chain = _mirrored(op), chain.reversed()
    if form == "steps" and link.ring > 1:
        return lambda: _by_steps(states, op, identity, link, chain, total)
    arriving = begin(states, link, chain, lambda source, here: total or source < max(here))

    def finish() -> list[Value]:
        known, token = arriving.finish()
        mine = chain.chunks[link.rank]
        # The token ties the first chunk, which receives nothing, to the exchange: its backward needs this rank as well.
        running = _tied(identity, token)
        found = {}
        for chunk in range(chain.total if total else max(mine) + 1):
            found[chunk] = running
            running = op(running, known[chunk])
        return [found[chunk] for chunk in mine] + ([running] if total else [])

    return finish


def _mirrored(op: Operation) -> Operation:
    return lambda first, second: op(second, first)


def _tied(state: Value, token: torch.Tensor) -> Value:
    return tuple(x + token.to(x.dtype) if x.is_floating_point() else x for x in state)


def _by_steps(
    states: Sequence[Value], op: Operation, identity: Value, link: Link, chain: Chain, total: bool
) -> list[Value]:
    """One leg over the ranks for the first chunk of each in the sequence's order, one back for the second (zigzag)."""
    order = sorted(range(len(states)), key=lambda local: chain.chunks[link.rank][local])
    upwards = min(chain.chunks[0]) < min(chain.chunks[-1])
    results: dict[int, Value] = {}
    carried = identity  # what the leg's first rank begins with: the whole leg before, which ended there
    for local in order:
        first, sign = (0, 1) if upwards else (link.ring - 1, -1)
        inclusive = op(carried, states[local]) if link.rank == first else states[local]
        step = 1
        while step < link.ring:
            inclusive = op(shift(inclusive, identity, link, sign * step), inclusive)
            step *= 2
        before = shift(inclusive, identity, link, sign)
        results[local] = op(carried, before) if link.rank == first else before
        carried, upwards = inclusive, not upwards
    found = [results[local] for local in range(len(states))]
    if not total:
        return found
    owner = next(rank for rank, here in enumerate(chain.chunks) if chain.total - 1 in here)
    known, token = collect([carried], link, one_each(link.ring), lambda source, here: source == owner)
    return [_tied(state, token) for state in (*found, known[owner])]
