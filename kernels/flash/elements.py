"""Operations on one tile, shared by the kernels and inlined into each: loads, logits, masks, dropout.

A tile of scores is (queries, keys) or, in the dK/dV pass, (keys, queries), so positions and ids are passed as
broadcastable columns and rows. Logits are scaled by log2(e), because the hardware computes exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import tables

HEADER = tl.constexpr(tables.HEADER)
RANGE = tl.constexpr(tables.RANGE)


@triton.jit
def load_header(headers, tile):
    """Return a row tile's (first local row, rows, rows without padding, global index of the first row)."""
    at = headers + tile * HEADER
    return tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def load_range(at):
    """Return the column tiles of one span that a row tile sees, the nine integers of tables.RANGE: (first_tile,
    first_full, end_full, end_tile, low, high, offset, valid, start)."""
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3),
        tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), tl.load(at + 8),
    )  # fmt: skip


@triton.jit
def load_rows(base, stride, inside, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Load (ROWS, WIDTH) from rows of DIM elements; zeros beyond DIM and, if MASKED, in rows not `inside`."""
    at = base + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    if MASKED:
        if DIM == WIDTH:
            tile = tl.load(at, mask=inside[:, None], other=0.0)
        else:
            tile = tl.load(at, mask=inside[:, None] & (tl.arange(0, WIDTH) < DIM)[None, :], other=0.0)
    else:
        if DIM == WIDTH:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(tl.arange(0, WIDTH) < DIM)[None, :], other=0.0)
    return tile


@triton.jit
def load_tile(tiles, batch, head, at, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Load (ROWS, WIDTH) from row `at` of one head through a descriptor of (B, heads, T, D): on Hopper the copy engine
    (TMA) reads it, and no register holds an address."""
    return tl.reshape(tiles.load([batch.to(tl.int32), head, at, 0]), (ROWS, WIDTH))


@triton.jit
def store_rows(base, stride, tile, inside, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Write the rows that are `inside`, DIM elements each."""
    at = base + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    tl.store(at, tile, mask=inside[:, None] & (tl.arange(0, WIDTH) < DIM)[None, :])


@triton.jit
def tanh(x):
    """Return tanh(x) to a few units in the last place of fp32: by a series near zero, where 1 - exp cancels."""
    e = tl.exp2(tl.abs(x) * -2.885390081777927)  # exp(-2 |x|)
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = x * (1.0 - square * (0.3333333333 - square * (0.1333333333 - square * 0.05396825397)))
    return tl.where(tl.abs(x) < 0.2, near, tl.where(x < 0.0, -far, far))


@triton.jit
def logits(qk, distance, scale, cap, slope, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Return (logits, tanh(x / softcap)), x as in docs/methods/blockwise.md "Logits". cap and slope are times log2(e);
    `scale`, the factor of q.k, is divided by the cap if there is one, else times log2(e)."""
    scaled = qk * scale
    tanh_x = scaled
    if SOFTCAP:
        tanh_x = tanh(scaled)
        scaled = tanh_x * cap
    if ALIBI:
        scaled -= slope * tl.abs(distance).to(tl.float32)
    return scaled, tanh_x


@triton.jit
def load_ids(base, inside, OTHER: tl.constexpr):
    """Load document ids; padding becomes OTHER, which differs for queries and keys, so that it matches no document."""
    ids = tl.load(base, mask=inside, other=-1)
    return tl.where(ids < 0, OTHER, ids)


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def hash_rows(seed, head, index):
    """Return the hash of each query, (seed, head, global index) -> uint32, as dropout.py computes it."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    salt = (head + 1).to(tl.uint32) * 0x9E3779B9
    return _mix(_mix(low ^ _mix(high + salt)) + index.to(tl.uint32))


@triton.jit
def kept(row_hash, index, threshold):
    """Return whether a probability is kept, from the query's hash and the key's global index."""
    return _mix(row_hash ^ (index.to(tl.uint32) * 0x85EBCA6B + 0xC2B2AE35)) >= threshold.to(tl.uint32, bitcast=True)
