"""The kernels of documents.py: the range of ids in each tile of columns, and the table entries narrowed by them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def extents_kernel(ids, entries, extents, length, spans, tiles, STEP: tl.constexpr):
    """Grid (tiles, spans, B). Write (lowest id, highest id, whether all tokens are of one document) per tile of columns
    into extents (B, spans, tiles, 3); padding has no id."""
    j = tl.program_id(0)
    span = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    offset = tl.load(entries + span * 9 + 6)  # of the first row tile: equal for all of them
    valid = tl.load(entries + span * 9 + 7)
    col = j * STEP + tl.arange(0, STEP)
    inside = col < valid
    own = tl.load(ids + batch * length + offset + col, mask=inside, other=-1).to(tl.int64)
    high = tl.max(own, 0)
    low = tl.min(tl.where(own < 0, 0x7FFFFFFFFFFFFFFF, own), 0)
    strangers = tl.sum((inside & (own < 0)).to(tl.int32), 0)
    extents += ((batch * spans + span) * tiles + j) * 3
    tl.store(extents, low)
    tl.store(extents + 1, high)
    tl.store(extents + 2, ((low == high) & (strangers == 0)).to(tl.int64))


@triton.jit
def narrow_kernel(
    ids, heads, entries, extents, narrowed, length, row_tiles, spans, tiles, TILE: tl.constexpr, SCAN: tl.constexpr
):
    """Grid (row tiles, spans, B). Narrow one table entry for one batch row, by the ids of its rows."""
    tile = tl.program_id(0)
    span = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    begin = tl.load(heads + tile * 4)
    row = tl.arange(0, TILE)
    inside = row < tl.load(heads + tile * 4 + 2)
    own = tl.load(ids + batch * length + begin + row, mask=inside, other=-1).to(tl.int64)
    high = tl.max(own, 0)
    low = tl.min(tl.where(own < 0, 0x7FFFFFFFFFFFFFFF, own), 0)
    alike = (low == high) & (tl.sum((inside & (own < 0)).to(tl.int32), 0) == 0)

    entry = entries + (tile * spans + span) * 9
    lo = tl.load(entry)
    full_lo = tl.load(entry + 1)
    full_hi = tl.load(entry + 2)
    hi = tl.load(entry + 3)
    extents += (batch * spans + span) * tiles * 3
    new_lo = hi
    new_hi = lo
    new_full = full_hi
    # [new_lo, new_hi): from the first to the last tile whose ids overlap the rows'. new_full: the first full tile.
    for first in range(lo, hi, SCAN):
        j = first + tl.arange(0, SCAN)
        here = j < hi
        their_low = tl.load(extents + j * 3, mask=here, other=0x7FFFFFFFFFFFFFFF)
        their_high = tl.load(extents + j * 3 + 1, mask=here, other=-1)
        one = tl.load(extents + j * 3 + 2, mask=here, other=0) > 0
        meets = (their_high >= low) & (their_low <= high)
        new_lo = tl.minimum(new_lo, tl.min(tl.where(meets, j, hi), 0))
        new_hi = tl.maximum(new_hi, tl.max(tl.where(meets, j + 1, lo), 0))
        full = one & (their_low == low) & (j >= full_lo) & (j < full_hi) & alike
        new_full = tl.minimum(new_full, tl.min(tl.where(full, j, full_hi), 0))
    new_full_end = full_hi  # the first tile after new_full that is not full
    for first in range(new_full, full_hi, SCAN):
        j = first + tl.arange(0, SCAN)
        here = j < full_hi
        their_low = tl.load(extents + j * 3, mask=here, other=-1)
        one = tl.load(extents + j * 3 + 2, mask=here, other=0) > 0
        ends = here & ((their_low != low) | (one == 0))
        new_full_end = tl.minimum(new_full_end, tl.min(tl.where(ends, j, full_hi), 0))
    new_hi = tl.maximum(new_hi, new_lo)
    new_full = tl.minimum(new_full, new_hi)
    new_full_end = tl.minimum(new_full_end, new_hi)
    narrowed += ((batch * row_tiles + tile) * spans + span) * 9
    tl.store(narrowed, new_lo)
    tl.store(narrowed + 1, new_full)
    tl.store(narrowed + 2, new_full_end)
    tl.store(narrowed + 3, new_hi)
    for field in range(4, 9):
        tl.store(narrowed + field, tl.load(entry + field))
