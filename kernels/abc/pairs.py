"""Pairs of tokens of one chunk under the weights of ABC, w_tjm = exp(s_jm - z_tm) for j <= t, with no exponent above 0.

A weight is a product of a factor of j and a factor of t only relative to some mass between the two; a single one for
the chunk would overflow or vanish where logits grow. So pairs meet in levels: at level l, rows are cut into blocks of
2^l, and t in an odd block meets j in the block before it, relative to the mass at the end of that block,

    exp(s_j - z_t) = exp(s_j - z_mid) exp(z_mid - z_t)        z_mid: of the last row of j's block, j <= mid < t

Each pair j < t meets at exactly one level, the diagonal is a sum over slots, and each level is a matrix product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..cosine.numbers import narrow


@triton.jit
def fade(a, b):
    """exp(a - b) of log masses where a is a part of b; 0 where a is empty, and never above 1."""
    return tl.exp(tl.minimum(a - tl.where(b == float("-inf"), 0.0, b), 0.0))


@triton.jit
def load_slots(base, stride, row, inside, SLOTS: tl.constexpr, WM: tl.constexpr):
    """Rows of (T, SLOTS), `stride` apart: log masses or logits in fp32, -inf elsewhere."""
    slot = tl.arange(0, WM)
    mask = inside[:, None] & (slot < SLOTS)[None, :]
    return tl.load(base + row[:, None] * stride + slot[None, :], mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def level(z_rows, s, z, row, count, SLOTS: tl.constexpr, WM: tl.constexpr, depth):
    """(which pairs meet (C, C), the factors of j (C, WM), the factors of t (C, WM)). z_rows: where the chunk's z begin;
    count: how many rows there are."""
    block = row >> depth
    end = (block << depth) + (1 << depth) - 1
    before = (block << depth) - 1
    of_column = fade(s, load_slots(z_rows, SLOTS, end, end < count, SLOTS, WM))
    of_row = fade(load_slots(z_rows, SLOTS, before, (before >= 0) & (before < count), SLOTS, WM), z)
    meets = ((block & 1) == 1)[:, None] & (block[:, None] - 1 == block[None, :])
    return meets, of_column, of_row


@triton.jit
def read(
    scores, z_rows, s, z, row, count,
    SLOTS: tl.constexpr, WM: tl.constexpr, LEVELS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """x_tm = sum_j scores_tj w_tjm: (C, WM). scores (C, C) are 0 where t must not see j."""
    diagonal = tl.sum(tl.where(row[:, None] == row[None, :], scores, 0.0), 1)
    found = diagonal[:, None] * fade(s, z)
    for i in range(LEVELS):
        meets, of_column, of_row = level(z_rows, s, z, row, count, SLOTS, WM, i)
        pairs, top = narrow(tl.where(meets, scores, 0.0), TYPE)
        found += tl.dot(pairs, of_column.to(TYPE), input_precision="ieee") * top * of_row
    return found


@triton.jit
def spread(
    y, z_rows, s, z, row, count, SLOTS: tl.constexpr, WM: tl.constexpr, LEVELS: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """b_tj = sum_m y_tm w_tjm for j <= t: (C, C), to be masked by who sees whom."""
    diagonal = tl.sum(y * fade(s, z), 1)
    found = tl.where(row[:, None] == row[None, :], diagonal[:, None], 0.0)
    for i in range(LEVELS):
        meets, of_column, of_row = level(z_rows, s, z, row, count, SLOTS, WM, i)
        left, top = narrow(y * of_row, TYPE)
        found += tl.where(meets, tl.dot(left, tl.trans(of_column.to(TYPE)), input_precision="ieee") * top, 0.0)
    return found


@triton.jit
def recall(
    scores, y, z_rows, s, z, row, count,
    SLOTS: tl.constexpr, WM: tl.constexpr, LEVELS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """x_jm = sum_t scores_tj y_tm w_tjm: (C, WM). scores (C, C) are 0 where t must not see j."""
    diagonal = tl.sum(tl.where(row[:, None] == row[None, :], scores, 0.0), 1)
    found = diagonal[:, None] * y * fade(s, z)
    for i in range(LEVELS):
        meets, of_column, of_row = level(z_rows, s, z, row, count, SLOTS, WM, i)
        pairs, top = narrow(tl.where(meets, scores, 0.0), TYPE)
        right, high = narrow(y * of_row, TYPE)
        found += tl.dot(tl.trans(pairs), right, input_precision="ieee") * (top * high) * of_column
    return found
