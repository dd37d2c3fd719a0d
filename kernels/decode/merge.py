"""Merge the splits of a context: out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i).

Splits are summed in order, so results repeat to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_kernel(
    parts, part_lse, out, lse, rows, splits, DV: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * rows, column tiles). parts (B, G, splits, rows, DV), part_lse (B, G, splits, rows), out
    (B, G, rows, DV), lse (B, G, rows): fp32, dense. SPLITS: a power of two, at least splits."""
    at_row = tl.program_id(0).to(tl.int64)
    at_first = at_row // rows * splits * rows + at_row % rows  # the row in split 0; the next split is `rows` further
    split = tl.arange(0, SPLITS)
    split_lse = tl.load(part_lse + at_first + split.to(tl.int64) * rows, mask=split < splits, other=float("-inf"))
    top = tl.max(split_lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)  # no split has seen a key: all weights are 0, not NaN
    total = tl.sum(tl.exp(split_lse - top), 0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    acc = tl.zeros([WIDTH], tl.float32)
    for i in range(splits):
        at = at_first + i * rows
        weight = tl.exp(tl.load(part_lse + at) - top)
        acc += weight * tl.load(parts + at * DV + column, mask=column < DV, other=0.0)
    seen = total > 0.0
    divisor = tl.where(seen, total, 1.0)
    tl.store(out + at_row * DV + column, acc / divisor, mask=column < DV)
    if tl.program_id(1) == 0:
        tl.store(lse + at_row, tl.where(seen, top + tl.log(divisor), float("-inf")))
