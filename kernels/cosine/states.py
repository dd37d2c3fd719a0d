"""The state at the boundaries of chunks: all chunks' contributions in parallel, and then a scan that sums them.

For N chunks there are N + 1 matrices (D, Dv). In forward, matrix c is the state before chunk c; in backward, matrix c +
1 is the gradient of the state after chunk c. So forward writes chunk c's contribution to matrix c + 1 and scans
upwards; backward writes it to matrix c and scans downwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import narrow


@triton.jit
def write_kernel(
    a, x, factor, ids, edges, states, ab, ah, at, xb, xh, xt, state_heads, group, length, chunks,
    CHUNK: tl.constexpr, DA: tl.constexpr, DX: tl.constexpr, TA: tl.constexpr, TX: tl.constexpr,
    AFTER: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Compute sum_j factor_j a_j x_j^T over the tokens of a chunk and the `group` heads that share the state.

    Grid (chunks, tiles of DA * tiles of DX, B * state heads). a (B, heads, T, DA), x (B, heads, T, DX), factor
    (B, heads, T) dense. Only tokens of one document count: that of the state after the chunk (AFTER = 1) or before (0).
    """
    chunk = tl.program_id(0)
    across = tl.cdiv(DX, TX)
    first_a = tl.program_id(1) // across * TA
    first_x = tl.program_id(1) % across * TX
    batch = (tl.program_id(2) // state_heads).to(tl.int64)
    state_head = tl.program_id(2) % state_heads
    heads = state_heads * group
    begin = (chunk * CHUNK).to(tl.int64)
    row = begin + tl.arange(0, CHUNK)
    part = row < length
    if DOCUMENTS:
        edge = tl.load(edges + batch * (chunks + 1) + chunk + AFTER)
        own = tl.load(ids + batch * length + row, mask=part, other=-1)
        part = (own >= 0) & (own == edge)
    column_a = first_a + tl.arange(0, TA)
    column_x = first_x + tl.arange(0, TX)
    total = tl.zeros([TA, TX], tl.float32)
    for i in range(group):
        head = (state_head * group + i).to(tl.int64)
        left = tl.load(
            a + batch * ab + head * ah + row[:, None] * at + column_a[None, :],
            mask=part[:, None] & (column_a < DA)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            x + batch * xb + head * xh + row[:, None] * xt + column_x[None, :],
            mask=part[:, None] & (column_x < DX)[None, :], other=0.0,
        )  # fmt: skip
        weight = tl.load(factor + (batch * heads + head) * length + row, mask=part, other=0.0)
        scaled, top = narrow(left.to(tl.float32) * weight[:, None], right.dtype)
        total += tl.dot(tl.trans(scaled), right, input_precision="ieee") * top
    slot = tl.program_id(2).to(tl.int64) * (chunks + 1) + chunk + AFTER
    place = states + slot * DA * DX + column_a[:, None] * DX + column_x[None, :]
    tl.store(place, total, mask=(column_a < DA)[:, None] & (column_x < DX)[None, :])


# Not specialised: triton would turn chunks = 1 into a Python int, which has no dtype to convert.
@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(
    states, start, factors, fb, fh, fc, fr, head_count, chunks,
    TILE: tl.constexpr, NUMBERS: tl.constexpr, WIDTH: tl.constexpr, DOWN: tl.constexpr, FACTORS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Scan over chunks, in place: state = factor * state + the chunk's contribution.

    Grid (tiles of a matrix, B * heads). states (B, heads, chunks + 1, NUMBERS) fp32, dense, a matrix having rows of
    WIDTH elements; start (B, heads, NUMBERS) dense, the first state. factors: one per chunk and row of the matrix, with
    strides; None for 1. DOWN: from the last chunk to the first. AHEAD: how many matrices are prefetched.
    """
    batch = (tl.program_id(1) // head_count).to(tl.int64)
    head = (tl.program_id(1) % head_count).to(tl.int64)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = column < NUMBERS
    states += tl.program_id(1).to(tl.int64) * (chunks + 1) * NUMBERS + column
    factors_here = factors
    if FACTORS:
        factors_here += batch * fb + head * fh + column // WIDTH * fr
    state = tl.load(start + tl.program_id(1).to(tl.int64) * NUMBERS + column, mask=inside, other=0.0)
    tl.store(states + chunks.to(tl.int64) * NUMBERS * DOWN, state, mask=inside)
    for i in tl.range(0, chunks, num_stages=AHEAD):
        chunk = i
        if DOWN:
            chunk = chunks - 1 - i
        slot = states + (chunk + 1 - DOWN).to(tl.int64) * NUMBERS
        written = tl.load(slot, mask=inside, other=0.0)
        if FACTORS:
            state *= tl.load(factors_here + chunk.to(tl.int64) * fc, mask=inside, other=1.0)
        state += written
        tl.store(slot, state, mask=inside)
