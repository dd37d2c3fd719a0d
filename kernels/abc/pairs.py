"""Products over pairs of tokens of one chunk under ABC's weights w_tjm = exp(s_jm - z_tm), j <= t, without overflow.

A matrix product needs a weight as a factor of j times a factor of t, relative to a mass between the two; one mass for
the whole chunk would overflow or underflow where logits grow. So pairs are computed in levels: at level l, rows are
split into blocks of 2^l, and each t in an odd block is paired with all j of the block before it, relative to the mass
z_mid at the end of that block:

    exp(s_j - z_t) = exp(s_j - z_mid) exp(z_mid - z_t)        j <= mid < t, so neither exponent is above 0

Each pair j < t belongs to exactly one level, each level is a matrix product, and the diagonal j = t is elementwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..cosine.numbers import narrow


@triton.jit
def fade(a, b):
    """Return exp(a - b) of log masses, where a is part of b: at most 1, and 0 where a is empty."""
    return tl.exp(tl.minimum(a - tl.where(b == float("-inf"), 0.0, b), 0.0))


@triton.jit
def load_slots(base, stride, row, inside, SLOTS: tl.constexpr, WM: tl.constexpr):
    """Load rows of (T, SLOTS), `stride` apart, as fp32: log masses or logits; -inf outside."""
    slot = tl.arange(0, WM)
    mask = inside[:, None] & (slot < SLOTS)[None, :]
    return tl.load(base + row[:, None] * stride + slot[None, :], mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def level(z_rows, s, z, row, count, SLOTS: tl.constexpr, WM: tl.constexpr, depth):
    """Return (the level's pairs as a mask (C, C), the factors of j (C, WM), the factors of t (C, WM)). z_rows: address
    of the chunk's first z; count: its number of rows."""
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
    """Return x_tm = sum_j scores_tj w_tjm, (C, WM). scores (C, C) are 0 where t does not see j."""
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
    """Return b_tj = sum_m y_tm w_tjm for j <= t, (C, C); the caller masks pairs of different documents."""
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
    """Return x_jm = sum_t scores_tj y_tm w_tjm, (C, WM). scores (C, C) are 0 where t does not see j."""
    diagonal = tl.sum(tl.where(row[:, None] == row[None, :], scores, 0.0), 1)
    found = diagonal[:, None] * y * fade(s, z)
    for i in range(LEVELS):
        meets, of_column, of_row = level(z_rows, s, z, row, count, SLOTS, WM, i)
        pairs, top = narrow(tl.where(meets, scores, 0.0), TYPE)
        right, high = narrow(y * of_row, TYPE)
        found += tl.dot(tl.trans(pairs), right, input_precision="ieee") * (top * high) * of_column
    return found
