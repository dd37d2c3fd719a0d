"""Which keys each query sees by global index: causality, window, length. Integers only, no torch.

A rank's queries and a block's keys are `Span`s of global indices. For two spans of one stride, "key j is visible to
query i" is a *band* in local indices, `low <= a - b <= high`, in every layout. A band splits into a few rectangles that
are visible as a whole, triangles that a fused kernel computes as causal, and, only at the far edge of a window, small
tiles that need a mask. So contiguous, zigzag and striped share one code path.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from longctx.errors import AttentionError
from longctx.layout import Span

TILE = 512
"""Largest side of a tile that is computed under an explicit mask: no mask is ever quadratic in the local length."""


class Rule(NamedTuple):
    """Key j is visible to query i iff `-right <= i - j <= left` and both are below `length` (None: no limit)."""

    left: int | None = None
    right: int | None = None
    length: int | None = None


class Kind:
    """How a tile is computed; plain ints, so that tiles sort and compare cheaply."""

    FULL = 0
    """Every query of the tile sees every key of it."""
    TRIANGLE = 1
    """Row a sees columns 0..a of the tile (causality aligned at its top-left corner)."""
    DENSE = 2
    """Some pairs are masked, by an explicit mask."""


class Tile(NamedTuple):
    """Queries [q0, q1) against keys [k0, k1), in local indices of the two blocks."""

    kind: int
    q0: int
    q1: int
    k0: int
    k1: int


def make_rule(causal: bool, window: int | tuple[int | None, int | None] | None, length: int | None = None) -> Rule:
    """Return the Rule of the users' `causal` and `window`.

    window: None; or w, the number of keys that a query sees to its left **including itself** (as in transformers;
    `causal` alone limits the right side); or (left, right), the numbers strictly left and strictly right of it (as in
    flash-attention; None or -1: no limit). `window=w` equals `(w - 1, None)`. The convention everywhere: a plain number
    counts the token itself, a pair and a Rule do not. transformers' bidirectional overlay is the one exception: its
    number is a distance, and models/hook/masks.py adds 1.
    """
    left: int | None = None
    right: int | None = None
    if isinstance(window, bool) or not isinstance(window, int | tuple | list | type(None)):
        raise AttentionError(f"window={window!r}: give None, a positive int, or a pair (left, right)")
    if isinstance(window, int):
        if window < 1:
            raise AttentionError(
                f"window={window}: a query sees at least itself; give a positive int or None for no window"
            )
        left = window - 1
    elif window is not None:
        if len(window) != 2 or any(
            x is not None and (isinstance(x, bool) or not isinstance(x, int) or x < -1) for x in window
        ):
            raise AttentionError(
                f"window={window!r}: a pair is (left, right), each an int >= 0, or None (or -1) for no limit"
            )
        left, right = (None if x is None or x == -1 else x for x in window)
    if causal:
        right = 0
    return Rule(left, right, length)


def band(q: Span, k: Span, rule: Rule) -> tuple[int, int] | None:
    """Return (low, high) such that key b of `k` is visible to query a of `q` iff low <= a - b <= high, or None.

    The bounds are clipped to what can occur: low == 1 - k.count and high == q.count - 1 mean "no limit".
    """
    assert q.stride == k.stride, "all spans of one ring have one stride"
    if not q.count or not k.count:
        return None
    shift, stride = q.start - k.start, q.stride  # i - j = shift + stride * (a - b)
    low, high = 1 - k.count, q.count - 1
    if rule.right is not None:
        low = max(low, -((rule.right + shift) // stride))  # ceil((-right - shift) / stride)
    if rule.left is not None:
        high = min(high, (rule.left - shift) // stride)
    return (low, high) if low <= high else None


def trim(span: Span, length: int | None) -> Span:
    """Return the part of the span below `length`; the rest is padding, which sees nothing and is seen by nothing."""
    if length is None:
        return span
    return Span(span.start, max(0, min(span.count, -((span.start - length) // span.stride))), span.stride)


def sees(q_spans: tuple[Span, ...], k_spans: tuple[Span, ...], rule: Rule) -> bool:
    """Return whether any query of `q_spans` sees any key of `k_spans`."""
    length = rule.length
    return any(band(trim(q, length), trim(k, length), rule) for q in q_spans for k in k_spans)


def visible(q_spans: tuple[Span, ...], k_spans: tuple[Span, ...], rule: Rule) -> int:
    """Return the exact number of visible (query, key) pairs: the work of a step."""
    total = 0
    for q in q_spans:
        for k in k_spans:
            q_trim, k_trim = trim(q, rule.length), trim(k, rule.length)
            limits = band(q_trim, k_trim, rule)
            if limits:
                n, m, (low, high) = q_trim.count, k_trim.count, limits
                total += _staircase(n, m, low) - _staircase(n, m, high + 1)
    return total


def _staircase(n: int, m: int, low: int) -> int:
    """Count the pairs (a, b) in [0, n) x [0, m) with a - b >= low; row a has clip(a - low + 1, 0, m) of them."""
    # Rows [first, last) lie on the slope; rows from max(first, last) on are full.
    first, last = max(0, low), min(n, low + m - 1)
    slope = 0
    if last > first:
        slope = (last - first) * ((first - low + 1) + (last - low)) // 2
    return slope + max(0, n - max(first, last)) * m


def pieces(n: int, m: int, low: int, high: int, q0: int = 0, k0: int = 0, tile: int = TILE) -> Iterator[Tile]:
    """Split the band low <= a - b <= high of an n x m block into tiles, shifted by (q0, k0).

    Without a window's far edge this is at most one rectangle and one triangle of any size. Along a far edge, rows are
    split into strips of `tile`: a DENSE tile at the far edge, a FULL core, a TRIANGLE at the near edge.
    """
    # Drop the rows and columns without a visible pair.
    rows, cols = (max(0, low), min(n, m + high)), (max(0, -high), min(m, n - low))
    if rows[0] >= rows[1] or cols[0] >= cols[1]:
        return
    q0, k0, shift = q0 + rows[0], k0 + cols[0], rows[0] - cols[0]
    n, m, low, high = rows[1] - rows[0], cols[1] - cols[0], low - shift, high - shift
    if high >= n - 1:  # no far edge
        yield from _lower_edge(n, m, low, q0, k0)
        return
    for top in range(0, n, tile):
        bottom = min(n, top + tile)
        first, last = max(0, top - high), min(m, bottom - low)  # the columns that any row of the strip sees
        core = max(0, bottom - 1 - high)  # every row of the strip sees the columns from here to its near edge
        if core > top - low:  # the window is narrower than the strip: no column is visible to all rows
            yield from _dense(Tile(Kind.DENSE, q0 + top, q0 + bottom, k0 + first, k0 + last), tile)
            continue
        core = min(core, last)
        if core > first:
            yield from _dense(Tile(Kind.DENSE, q0 + top, q0 + bottom, k0 + first, k0 + core), tile)
        if last > core:
            yield from _lower_edge(bottom - top, last - core, low - top + core, q0 + top, k0 + core)


def _lower_edge(n: int, m: int, low: int, q0: int, k0: int) -> Iterator[Tile]:
    """Split the band a - b >= low, where low <= 0: a rectangle left of the slope, and the slope."""
    full = min(m, 1 - low) if low <= 1 - m else -low  # low <= 1 - m: even row 0 sees every column
    if full:
        yield Tile(Kind.FULL, q0, q0 + n, k0, k0 + full)
    if full < m:
        yield Tile(Kind.TRIANGLE, q0, q0 + n, k0 + full, k0 + m)


def _dense(tile: Tile, side: int) -> Iterator[Tile]:
    for left in range(tile.k0, tile.k1, side):
        yield tile._replace(k0=left, k1=min(tile.k1, left + side))
