"""Inverse norms of rows, computed once per pass: 1 / ||x||, and 1 / ||x|| times the scale n^-a on the side that has it.

With these two factors per row, the products of product.py read q and k as they are: nothing is rounded after a division
before it enters a tensor core.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..flash.elements import load_rows


@triton.jit
def lengths_kernel(
    x, size, ids, inverse, factor, xb, xh, xt, sb, sh, st, head_count, length,
    TILE: tl.constexpr, DX: tl.constexpr, WX: tl.constexpr, SIZED: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, B * heads). x (B, heads, T, DX); size (B, heads, T) fp32; inverse, factor (B, heads, T)
    fp32, dense. Both are 0 at padding, whatever it holds. factor: written if SIZED, else inverse stands for it."""
    begin = (tl.program_id(0) * TILE).to(tl.int64)
    batch = (tl.program_id(1) // head_count).to(tl.int64)
    head = (tl.program_id(1) % head_count).to(tl.int64)
    row = begin + tl.arange(0, TILE)
    valid = row < length
    if DOCUMENTS:
        valid = tl.load(ids + batch * length + row, mask=valid, other=-1) >= 0
    tile = load_rows(x + batch * xb + head * xh + begin * xt, xt, valid, TILE, DX, WX, True).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(tile * tile, 1)), 1e-12)
    found = tl.where(valid, 1.0 / norm, 0.0)
    at = tl.program_id(1).to(tl.int64) * length + row
    tl.store(inverse + at, found, mask=row < length)
    if SIZED:
        scale = tl.load(size + batch * sb + head * sh + row * st, mask=valid, other=0.0)
        tl.store(factor + at, found * scale, mask=row < length)
