"""Block tables: for every tile of rows, which tiles of columns it sees, and which of those need no mask.

A kernel's program computes one tile of one side (its rows) and loops over tiles of the other (its columns). Backward's
second pass uses the table with the sides swapped. A table is built once per geometry, from integers alone, and cached
on the device, so a ring step builds and copies nothing; documents narrow it on the device (documents.py).

With row a and column b counted within their spans, b is visible to a iff low <= a - b <= high (attention/band.py; the
same bands as tiles for the CPU: attention/tiles.py).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

Band = tuple[int, int] | None
HEADER = 4
"""Integers per row tile: first local row, rows, rows without padding, global index of the first."""
RANGE = 9
"""Integers per (row tile, column span): first_tile, first_full, end_full, end_tile (tiles of columns: the row tile sees
[first_tile, end_tile), and all of [first_full, end_full)); low, high (row a of the tile sees column b of the span iff
low <= a - b <= high); offset, valid, start of the column span, as in Side."""


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
    """headers (row tiles, HEADER) and ranges ([B,] row tiles, column spans, RANGE), int32."""

    headers: torch.Tensor
    ranges: torch.Tensor

    @property
    def tiles(self) -> int:
        return self.headers.shape[0]


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
            header = (side.offset + first, count, valid, side.start + first * geometry.stride)
            ranges = [
                _range(first, valid, step, column, band) for column, band in zip(geometry.cols, bands, strict=True)
            ]
            rows.append((sum(found[3] - found[0] for found in ranges), header, ranges))
    rows = sorted((row for row in rows if idle or row[0]), key=lambda row: -row[0])
    headers = torch.tensor([row[1] for row in rows], dtype=torch.int32).reshape(-1, HEADER)
    column_ranges = torch.tensor([row[2] for row in rows], dtype=torch.int32).reshape(-1, len(geometry.cols), RANGE)
    return Table(headers.to(device), column_ranges.to(device))


def _range(first: int, rows: int, step: int, side: Side, band: Band) -> tuple[int, ...]:
    """Return the RANGE integers of one span of columns for rows [first, first + rows) of a span of rows.

    Row a sees columns a - high to a - low, so any row of the tile sees columns from `first - high` to `last - low`, and
    every row those from `last - high` to `first - low`.
    """
    nothing = (0, 0, 0, 0, 0, 0, side.offset, side.valid, side.start)
    if band is None or not rows:
        return nothing
    (low, high), last = band, first + rows - 1
    begin, end = max(0, first - high), min(side.valid, last - low + 1)
    if begin >= end:
        return nothing
    first_tile, end_tile = begin // step, -(-end // step)  # rounded outwards: tiles with any visible column
    full_begin, full_end = max(0, last - high), min(side.valid, first - low + 1)
    first_full = min(max(first_tile, -(-full_begin // step)), end_tile)  # rounded inwards: whole tiles only
    end_full = max(first_full, full_end // step)
    limits = (low - first, high - first)  # with rows counted from the tile's first
    return (first_tile, first_full, end_full, end_tile, *limits, side.offset, side.valid, side.start)
