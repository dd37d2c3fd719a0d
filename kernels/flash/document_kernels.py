"""The kernels of documents.py: the range of ids in each tile of columns, and the block table narrowed by them.

Row tiles and column tiles are compared by their lowest and highest id only, so a narrowed range may hold tiles that
share no document with the rows; the attention kernels then mask all their pairs. It never leaves out a tile that does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import RANGE, load_header, load_range


@triton.jit
def extents_kernel(ids, ranges, extents, length, spans, tiles, COLS: tl.constexpr):
    """Grid (tiles, spans, B). Write (lowest id, highest id, whether all tokens are of one document) per tile of columns
    into extents (B, spans, tiles, 3); padding has no id."""
    j = tl.program_id(0)
    span = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    _, _, _, _, _, _, offset, valid, _ = load_range(ranges + span * RANGE)  # of row tile 0: equal for all row tiles
    col = j * COLS + tl.arange(0, COLS)
    inside = col < valid
    own = tl.load(ids + batch * length + offset + col, mask=inside, other=-1).to(tl.int64)
    highest = tl.max(own, 0)
    lowest = tl.min(tl.where(own < 0, 0x7FFFFFFFFFFFFFFF, own), 0)
    padding = tl.sum((inside & (own < 0)).to(tl.int32), 0)
    extents += ((batch * spans + span) * tiles + j) * 3
    tl.store(extents, lowest)
    tl.store(extents + 1, highest)
    tl.store(extents + 2, ((lowest == highest) & (padding == 0)).to(tl.int64))


@triton.jit
def narrow_kernel(
    ids, headers, ranges, extents, narrowed, length, row_tiles, spans, tiles, ROWS: tl.constexpr, SCAN: tl.constexpr
):
    """Grid (row tiles, spans, B). Narrow one range of the table for one batch row, by the ids of its rows."""
    tile = tl.program_id(0)
    span = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    begin, _, valid_rows, _ = load_header(headers, tile)
    row = tl.arange(0, ROWS)
    inside = row < valid_rows
    own = tl.load(ids + batch * length + begin + row, mask=inside, other=-1).to(tl.int64)
    highest = tl.max(own, 0)
    lowest = tl.min(tl.where(own < 0, 0x7FFFFFFFFFFFFFFF, own), 0)
    rows_are_one = (lowest == highest) & (tl.sum((inside & (own < 0)).to(tl.int32), 0) == 0)

    at_range = ranges + (tile * spans + span) * RANGE
    first_tile, first_full, end_full, end_tile, low, high, offset, valid, start = load_range(at_range)
    extents += (batch * spans + span) * tiles * 3
    new_first = end_tile
    new_end = first_tile
    new_full = end_full
    # [new_first, new_end): from the first to the last tile whose ids overlap the rows'. new_full: the first full tile.
    for scanned in range(first_tile, end_tile, SCAN):
        j = scanned + tl.arange(0, SCAN)
        here = j < end_tile
        their_lowest = tl.load(extents + j * 3, mask=here, other=0x7FFFFFFFFFFFFFFF)
        their_highest = tl.load(extents + j * 3 + 1, mask=here, other=-1)
        cols_are_one = tl.load(extents + j * 3 + 2, mask=here, other=0) > 0
        overlaps = (their_highest >= lowest) & (their_lowest <= highest)
        new_first = tl.minimum(new_first, tl.min(tl.where(overlaps, j, end_tile), 0))
        new_end = tl.maximum(new_end, tl.max(tl.where(overlaps, j + 1, first_tile), 0))
        # Both tiles are of one document (so their lowest ids are their only ids), and it is the same one.
        full = rows_are_one & cols_are_one & (their_lowest == lowest) & (j >= first_full) & (j < end_full)
        new_full = tl.minimum(new_full, tl.min(tl.where(full, j, end_full), 0))
    new_full_end = end_full  # the first tile after new_full that is not full
    for scanned in range(new_full, end_full, SCAN):
        j = scanned + tl.arange(0, SCAN)
        here = j < end_full
        their_lowest = tl.load(extents + j * 3, mask=here, other=-1)
        cols_are_one = tl.load(extents + j * 3 + 2, mask=here, other=0) > 0
        ends = here & ((their_lowest != lowest) | (cols_are_one == 0))
        new_full_end = tl.minimum(new_full_end, tl.min(tl.where(ends, j, end_full), 0))
    new_end = tl.maximum(new_end, new_first)
    new_full = tl.minimum(new_full, new_end)
    new_full_end = tl.minimum(new_full_end, new_end)
    narrowed += ((batch * row_tiles + tile) * spans + span) * RANGE
    tl.store(narrowed, new_first)
    tl.store(narrowed + 1, new_full)
    tl.store(narrowed + 2, new_full_end)
    tl.store(narrowed + 3, new_end)
    tl.store(narrowed + 4, low)
    tl.store(narrowed + 5, high)
    tl.store(narrowed + 6, offset)
    tl.store(narrowed + 7, valid)
    tl.store(narrowed + 8, start)
