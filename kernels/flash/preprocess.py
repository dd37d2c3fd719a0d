"""Compute what all steps of backward need of each query: delta = rowsum(dO * O) - dLSE, and the lse times log2(e), +inf
for a row that saw no key (so that its probabilities are exp2(-inf) = 0)."""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import load_rows


@triton.jit
def preprocess_kernel(
    out, dout, lse, dlse, delta, lse2,
    ob, oh, ot, dob, doh, dot, lb, lh, dlb, dlh, head_count, length,
    ROWS: tl.constexpr, DV: tl.constexpr, WV: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, B * H). delta and lse2 (B, H, T) are dense; lse, dlse have a dense last dimension."""
    begin = (tl.program_id(0) * ROWS).to(tl.int64)
    batch = (tl.program_id(1) // head_count).to(tl.int64)
    head = (tl.program_id(1) % head_count).to(tl.int64)
    row = begin + tl.arange(0, ROWS)
    inside = row < length
    o = load_rows(out + batch * ob + head * oh + begin * ot, ot, inside, ROWS, DV, WV, True).to(tl.float32)
    do = load_rows(dout + batch * dob + head * doh + begin * dot, dot, inside, ROWS, DV, WV, True).to(tl.float32)
    total = tl.sum(o * do, 1)
    if DLSE:
        total -= tl.load(dlse + batch * dlb + head * dlh + row, mask=inside, other=0.0)
    own = tl.load(lse + batch * lb + head * lh + row, mask=inside, other=float("-inf"))
    own = tl.where(own == float("-inf"), float("inf"), own * 1.4426950408889634)
    at = tl.program_id(1).to(tl.int64) * length + row
    tl.store(delta + at, total, mask=inside)
    tl.store(lse2 + at, own, mask=inside)
