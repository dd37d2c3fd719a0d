"""The causal product and all its gradients in one kernel: a sum over pairs of rows of the chunk, plus the state's part.

    out_t = own_t (sum_{visible j} (a_t . b_j) other_j x_j + a_t S)

| out | a | b | x | S: the state | visible j |
|---|---|---|---|---|---|
| output   | q  | k  | v  | before the chunk                    | j <= t |
| dq       | dO | v  | k  | before the chunk, transposed        | j <= t |
| dk       | v  | dO | q  | gradient after the chunk, transposed | j >= t, all heads of the group |
| dv       | k  | q  | dO | gradient after the chunk            | j >= t, all heads of the group |

own and other are the factors of the two sides: 1 / ||q||, 1 / ||k||, one of them times n^-a. They are applied after the
products, so a and x enter tensor cores unscaled. dq and dk also need the gradient of their own row's normalisation:
with y the row, i = 1 / ||y|| and d the result above,

    dy = d - y i^2 (d . y)          the gradient of n^-a is (d . y) / n^-a
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..flash.elements import load_rows, store_rows
from .numbers import narrow


@triton.jit
def product_kernel(
    a, b, x, own, other, states, ids, edges, out, row_of, inverse, dsize,
    ab, ah, at, bb, bh, bt, xb, xh, xt, ob, oh, ot, yb, yh, yt, state_row, state_column, head_count, group, length,
    chunks,
    CHUNK: tl.constexpr, STEP: tl.constexpr, DA: tl.constexpr, WA: tl.constexpr, DX: tl.constexpr, WX: tl.constexpr,
    REVERSED: tl.constexpr, DOCUMENTS: tl.constexpr, UNIT: tl.constexpr, SIZED: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, B * heads of a). Strides as given, the last dimension dense; own, other, inverse, dsize (B, heads,
    T) fp32 and dense; states (B, G, chunks + 1, D, Dv) fp32. REVERSED: a is of the key side. UNIT: compute dy, with y =
    row_of; SIZED: also write dsize, the gradient of n^-a."""
    chunk = tl.program_id(0)
    batch = (tl.program_id(1) // head_count).to(tl.int64)
    head = tl.program_id(1) % head_count
    begin = (chunk * CHUNK).to(tl.int64)
    row = tl.arange(0, CHUNK)
    valid = begin + row < length
    meets = row[:, None] >= row[None, :]
    if REVERSED:
        meets = row[:, None] <= row[None, :]
        state_head, state_heads = head, head_count
        first, others, other_heads = head * group, group, head_count * group
    else:
        state_head, state_heads = head // group, head_count // group
        first, others, other_heads = state_head, 1, state_heads
    if DOCUMENTS:
        document = tl.load(ids + batch * length + begin + row, mask=valid, other=-1)
        valid = document >= 0
        meets &= (document[:, None] == document[None, :]) & valid[:, None]
        remembers = valid & (document == tl.load(edges + batch * (chunks + 1) + chunk + REVERSED))
    a += batch * ab + head.to(tl.int64) * ah + begin * at
    states += ((batch * state_heads + state_head) * (chunks + 1) + chunk + REVERSED) * DA * DX

    column = tl.arange(0, WX)
    total = tl.zeros([CHUNK, WX], tl.float32)
    for start in range(0, WA, STEP):
        depth = start + tl.arange(0, STEP)
        left = tl.load(
            a + row[:, None] * at + depth[None, :], mask=valid[:, None] & (depth < DA)[None, :], other=0.0
        )  # fmt: skip
        state = tl.load(
            states + depth[:, None] * state_row + column[None, :] * state_column,
            mask=(depth < DA)[:, None] & (column < DX)[None, :], other=0.0,
        )  # fmt: skip
        state, top = narrow(state, left.dtype)
        total += tl.dot(left, state, input_precision="ieee") * top
    if DOCUMENTS:
        total = tl.where(remembers[:, None], total, 0.0)

    for i in range(others):
        other_head = (first + i).to(tl.int64)
        scores = tl.zeros([CHUNK, CHUNK], tl.float32)
        for start in range(0, WA, STEP):
            depth = start + tl.arange(0, STEP)
            mask = valid[:, None] & (depth < DA)[None, :]
            left = tl.load(a + row[:, None] * at + depth[None, :], mask=mask, other=0.0)
            right = tl.load(
                b + batch * bb + other_head * bh + (begin + row)[:, None] * bt + depth[None, :], mask=mask, other=0.0
            )  # fmt: skip
            scores += tl.dot(left, tl.trans(right), input_precision="ieee")
        weight = tl.load(other + (batch * other_heads + other_head) * length + begin + row, mask=valid, other=0.0)
        value = load_rows(x + batch * xb + other_head * xh + begin * xt, xt, valid, CHUNK, DX, WX, True)
        pairs, top = narrow(tl.where(meets, scores * weight[None, :], 0.0), value.dtype)
        total += tl.dot(pairs, value, input_precision="ieee") * top

    inside = begin + row < length
    place = tl.program_id(1).to(tl.int64) * length + begin + row
    factor = tl.load(own + place, mask=valid, other=0.0)
    total *= factor[:, None]
    if UNIT:
        y = load_rows(row_of + batch * yb + head.to(tl.int64) * yh + begin * yt, yt, valid, CHUNK, DX, WX, True)
        y = y.to(tl.float32)
        along = tl.sum(total * y, 1)
        i = tl.load(inverse + place, mask=valid, other=0.0)
        total -= y * (i * i * along)[:, None]
        if SIZED:
            found = tl.where(valid, along * i / tl.where(valid, factor, 1.0), 0.0)
            tl.store(dsize + place, found, mask=inside)
    store_rows(out + batch * ob + head.to(tl.int64) * oh + begin * ot, ot, total, inside, CHUNK, DX, WX)
