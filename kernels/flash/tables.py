"""Block tables: for every tile of rows, which tiles of columns it sees, and which of those need no mask.

A kernel's program computes one tile of one side (its rows) and loops over tiles of the other (its columns). Backward's
second pass uses the table with the sides swapped. A table is built once per geometry, from integers alone, and cached
on the device, so a ring step builds and copies nothing; documents narrow it on the device (documents.py).

With row a and column b counted within their spans, b is visible to a iff low <= a - b <= high (attention/band.py).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

Band = tuple[int, int] | None
HEAD = 4
"""Integers per row tile: first local row, rows, rows without padding, global index of the first."""
ENTRY = 9
"""Integers per (row tile, column span): lo, full_lo, full_hi, hi (tiles of columns), near, far (visible iff near <= row
of the tile - column <= far), first local column of the span, columns without padding, global index of the first."""


class Side(NamedTuple):
    """A span of local tokens: local index of the first, number, number without padding, global index of the first."""

    offset: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    valid: int
    start: int


class Geometry(NamedTuple):
    """Which columns each row sees by index: `bands[r][c]` of row span r and column span c, None if none is visible.

    stride: step of the global index from one token of a span to the next; one for all.
    """

    rows: tuple[Side, ...]
    cols: tuple[Side, ...]
    bands: tuple[tuple[Band, ...], ...]
    stride: int

    def swapped(self) -> Geometry:
        """Return the geometry with columns as rows."""
        bands = tuple(
            tuple(None if band is None else (-band[1], -band[0]) for band in column)
            for column in zip(*self.bands, strict=True)
        )
        return Geometry(self.cols, self.rows, bands, self.stride)


class Table(NamedTuple):
    """heads (tiles, HEAD) and entries ([B,] tiles, column spans, ENTRY), int32."""

    heads: torch.Tensor
    entries: torch.Tensor

    @property
    def tiles(self) -> int:
        return self.heads.shape[0]


@lru_cache(maxsize=1024)
def index_table(geometry: Geometry, tile: int, step: int, device: torch.device, idle: bool) -> Table:
    """Return the table for tiles of `tile` rows and tiles of `step` columns.

    Row tiles are in descending order of work, so that the shortest start last and none runs on alone.

    Args:
        idle: include row tiles that see nothing, because a program must write their zeros.
    """
    rows = []
    for side, bands in zip(geometry.rows, geometry.bands, strict=True):
        for first in range(0, side.count, tile):
            count, valid = (max(0, min(tile, limit - first)) for limit in (side.count, side.valid))
            head = (side.offset + first, count, valid, side.start + first * geometry.stride)
            entries = [
                _entry(first, valid, step, column, band) for column, band in zip(geometry.cols, bands, strict=True)
            ]
            rows.append((sum(entry[3] - entry[0] for entry in entries), head, entries))
    rows = sorted((row for row in rows if idle or row[0]), key=lambda row: -row[0])
    heads = torch.tensor([row[1] for row in rows], dtype=torch.int32).reshape(-1, HEAD)
    table = torch.tensor([row[2] for row in rows], dtype=torch.int32).reshape(-1, len(geometry.cols), ENTRY)
    return Table(heads.to(device), table.to(device))


def _entry(first: int, rows: int, step: int, side: Side, band: Band) -> tuple[int, ...]:
    """Return the entry of one span of columns for rows [first, first + rows) of another span. A tile is full if it is
    complete and every row sees all of it."""
    nothing = (0, 0, 0, 0, 0, 0, side.offset, side.valid, side.start)
    if band is None or not rows:
        return nothing
    (low, high), last = band, first + rows - 1
    begin, end = max(0, first - high), min(side.valid, last - low + 1)
    if begin >= end:
        return nothing
    full_begin, full_end = max(0, last - high), min(side.valid, first - low + 1)
    lo, hi = begin // step, -(-end // step)
    full_lo = min(max(lo, -(-full_begin // step)), hi)
    full_hi = max(full_lo, full_end // step)
    return (lo, full_lo, full_hi, hi, low - first, high - first, side.offset, side.valid, side.start)
