"""Turn a BlockMask into few calls of a fused kernel: rectangles, aligned triangles, and small tiles under a mask.

Without documents the tiles follow from the indices and are cached: a zigzag step is one rectangle, a rank's own block
one triangle. With documents, each batch row's tokens are split into runs of one document. A long run is planned as a
sequence of its own; neighbouring short runs are computed together under a mask of at most 512 x 512.

For the CPU. The GPU kernels read the same bands as block tables (kernels/flash/tables.py, documents.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from longctx.attention.band import TILE, Kind, Rule, Tile, band, pieces, trim
from longctx.attention.mask import BlockMask
from longctx.layout import Span

SHORT = 64
"""Runs below this length do not get a call of their own (a call costs about as much as 100 x 100 pairs)."""
CLUSTER = 128
"""The most tokens of short runs that share one masked tile."""


class Segment(NamedTuple):
    """Consecutive local tokens [begin, begin + span.count) whose document ids lie in [low, high]."""

    begin: int
    span: Span
    low: int
    high: int


Plan = list[tuple[slice, tuple[Tile, ...]]]


def plan(mask: BlockMask, batch: int) -> Plan:
    """Return which tiles to compute for which slice of the batch; every visible pair is in exactly one tile."""
    if mask.q_documents is None or mask.k_documents is None:
        tiles = index_tiles(mask.q_spans, mask.k_spans, mask.rule)
        return [(slice(0, batch), tiles)] if tiles else []
    if not index_tiles(mask.q_spans, mask.k_spans, mask.rule):
        return []
    q_ids, k_ids = mask.q_documents, mask.k_documents
    if batch > 1 and bool((q_ids == q_ids[:1]).all()) and bool((k_ids == k_ids[:1]).all()):
        rows = [slice(0, batch)]  # all rows have the same documents
    else:
        rows = [slice(b, b + 1) for b in range(batch)]
    plans = []
    for row in rows:
        q_segments = segments(q_ids[row.start], mask.q_spans, mask.rule.length)
        k_segments = segments(k_ids[row.start], mask.k_spans, mask.rule.length)
        tiles = _merged(_document_tiles(q_segments, k_segments, mask.rule))
        if tiles:
            plans.append((row, tiles))
    return plans


@lru_cache(maxsize=1024)
def index_tiles(q_spans: tuple[Span, ...], k_spans: tuple[Span, ...], rule: Rule) -> tuple[Tile, ...]:
    """Return the tiles of a block without documents."""
    return _merged(
        tile
        for q0, q in _offsets(q_spans, rule.length)
        for k0, k in _offsets(k_spans, rule.length)
        for tile in _pair(q0, q, k0, k, rule)
    )


def _pair(q0: int, q: Span, k0: int, k: Span, rule: Rule) -> Iterator[Tile]:
    limits = band(q, k, rule)
    if limits:
        yield from pieces(q.count, k.count, *limits, q0, k0)


def _offsets(spans: tuple[Span, ...], length: int | None) -> Iterator[tuple[int, Span]]:
    offset = 0
    for span in spans:
        yield offset, trim(span, length)
        offset += span.count


def segments(ids: torch.Tensor, spans: tuple[Span, ...], length: int | None) -> list[Segment]:
    """Split one row's local tokens into long runs of one document and clusters of short runs; padding is left out.

    Args:
        ids: (T,) document ids.
        spans: the tokens' global indices.
        length: global indices from here on are padding too.
    """
    result: list[Segment] = []
    for offset, span in _offsets(spans, length):
        if not span.count:
            continue
        own = ids[offset : offset + span.count]
        starts = [0, *((own[1:] != own[:-1]).nonzero().flatten() + 1).tolist(), span.count]
        values = own[torch.tensor(starts[:-1], device=own.device)].tolist()
        cluster: Segment | None = None  # consecutive short runs that have not been appended yet
        for begin, end, value in zip(starts, starts[1:], values, strict=False):
            piece = Segment(offset + begin, span.slice(begin, end - begin), value, value)
            joins = value >= 0 and end - begin < SHORT
            if cluster and joins and cluster.span.count + end - begin <= CLUSTER:
                count = cluster.span.count + end - begin
                cluster = Segment(
                    cluster.begin, cluster.span._replace(count=count), min(cluster.low, value), max(cluster.high, value)
                )
                continue
            if cluster:
                result.append(cluster)
            cluster = piece if joins else None
            if value >= 0 and not joins:
                result.append(piece)
        if cluster:
            result.append(cluster)
    return result


def _document_tiles(q_segments: list[Segment], k_segments: list[Segment], rule: Rule) -> Iterator[Tile]:
    if not q_segments or not k_segments:
        return
    lows, highs = (torch.tensor([getattr(k, name) for k in k_segments]) for name in ("low", "high"))
    for q in q_segments:
        for index in ((lows <= q.high) & (highs >= q.low)).nonzero().flatten().tolist():
            k = k_segments[index]
            if q.low == q.high == k.low == k.high:
                yield from _pair(q.begin, q.span, k.begin, k.span, rule)
            else:
                yield from _masked(q, k, rule)


def _masked(q: Segment, k: Segment, rule: Rule) -> Iterator[Tile]:
    """Yield tiles of at most 512 x 512 that may hold pairs of one document, without those hidden by index."""
    for i in range(0, q.span.count, TILE):
        rows = q.span.slice(i, min(TILE, q.span.count - i))
        for j in range(0, k.span.count, TILE):
            cols = k.span.slice(j, min(TILE, k.span.count - j))
            if band(rows, cols, rule):
                first = (q.begin + i, k.begin + j)
                yield Tile(Kind.DENSE, first[0], first[0] + rows.count, first[1], first[1] + cols.count)


def _merged(tiles: Iterable[Tile]) -> tuple[Tile, ...]:
    """Join adjacent tiles into larger ones, so that one call does the work of several."""
    by_kind: dict[int, list[Tile]] = {Kind.FULL: [], Kind.TRIANGLE: [], Kind.DENSE: []}
    for tile in tiles:
        by_kind[tile.kind].append(tile)
    rectangles, triangles = _with_corners(_joined(by_kind[Kind.FULL]), by_kind[Kind.TRIANGLE])
    # In order of rows, as Written in backends/aten.py expects.
    return tuple(sorted(by_kind[Kind.DENSE] + rectangles + triangles, key=lambda t: (t.q0, t.k0)))


def _joined(rectangles: list[Tile]) -> list[Tile]:
    """Join rectangles with the same columns vertically, then those with the same rows horizontally."""
    tall: list[Tile] = []
    for tile in sorted(rectangles, key=lambda t: (t.k0, t.k1, t.q0)):
        if tall and (tall[-1].k0, tall[-1].k1, tall[-1].q1) == (tile.k0, tile.k1, tile.q0):
            tall[-1] = tall[-1]._replace(q1=tile.q1)
        else:
            tall.append(tile)
    wide: list[Tile] = []
    for tile in sorted(tall, key=lambda t: (t.q0, t.q1, t.k0)):
        if wide and (wide[-1].q0, wide[-1].q1, wide[-1].k1) == (tile.q0, tile.q1, tile.k0):
            wide[-1] = wide[-1]._replace(k1=tile.k1)
        else:
            wide.append(tile)
    return wide


def _with_corners(rectangles: list[Tile], triangles: list[Tile]) -> tuple[list[Tile], list[Tile]]:
    """Join two triangles along the diagonal and the rectangle in their corner into one triangle: a zigzag rank's own
    block. Return (the other rectangles, triangles)."""
    rectangles, joined = list(rectangles), list[Tile]()
    for tile in sorted(triangles):
        last = joined[-1] if joined else tile
        corner = Tile(Kind.FULL, last.q1, tile.q1, last.k0, last.k1)  # below the first, left of the second
        square = last.q1 - last.q0 == last.k1 - last.k0
        if square and (last.q1, last.k1) == (tile.q0, tile.k0) and corner in rectangles:
            rectangles.remove(corner)
            joined[-1] = Tile(Kind.TRIANGLE, last.q0, tile.q1, last.k0, tile.k1)
        else:
            joined.append(tile)
    return rectangles, joined
