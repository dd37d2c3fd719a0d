"""ABC backward for keys, values and control logits: their gradients from later queries and from the state.

With a_j = exp(s_j - z at the chunk's end), and UK, UV, Uc the gradients of the states K, V and of the log mass there,

    dk_j = sum_t (g_t . w_tj) q_t + UK^T a_j      dv_j = sum_t (p_t . w_tj) dO_t + UV^T a_j
    ds_j = sum_t w_tj (g_t (q_t . k_j) + p_t (dO_t . v_j) - c_t) + a_j (UK k_j + UV v_j - Uc)
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..cosine.numbers import narrow
from ..flash.elements import load_rows, store_rows
from .pairs import fade, load_slots, recall, spread
from .rows import against_memory, from_memory


@triton.jit
def columns_kernel(
    x, read_by, y, s, z, boundary, memory, ids, edges, out, xb, xh, xt, rb, rh, rt, sb, sh, st,
    head_count, group, length, chunks,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, SLOTS: tl.constexpr, WM: tl.constexpr, DX: tl.constexpr,
    WX: tl.constexpr, DOCUMENTS: tl.constexpr, CONTROL: tl.constexpr, FIRST: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, B * G). One state per launch: x = k, read_by = q, y = g, or x = v, read_by = dO, y = p. y (B, H,
    T, M) and memory (B, G, chunks + 1, M, DX), the state's gradient, are fp32 and dense.

    Writes out (B, G, T, DX), dense. CONTROL: writes this state's part of ds into out (B, G, T, M), fp32, instead, or
    adds it unless FIRST. MASS: the part of the log mass, with y = c and x = 1, is subtracted.
    """
    chunk = tl.program_id(0)
    batch = (tl.program_id(1) // head_count).to(tl.int64)
    head = (tl.program_id(1) % head_count).to(tl.int64)
    begin = (chunk * CHUNK).to(tl.int64)
    row = tl.arange(0, CHUNK)
    inside = begin + row < length
    valid = inside
    remains = inside
    meets = (row[:, None] >= row[None, :]) & inside[:, None]
    state = tl.program_id(1).to(tl.int64) * (chunks + 1) + chunk + 1
    if DOCUMENTS:
        document = tl.load(ids + batch * length + begin + row, mask=inside, other=-1)
        valid = document >= 0
        meets &= (document[:, None] == document[None, :]) & valid[:, None]
        remains = valid & (document == tl.load(edges + batch * (chunks + 1) + chunk + 1))
    s_tile = load_slots(s + batch * sb + head * sh + begin * st, st, row, valid, SLOTS, WM)
    z_rows = z + (tl.program_id(1).to(tl.int64) * length + begin) * SLOTS
    z_tile = load_slots(z_rows, SLOTS, row, valid, SLOTS, WM)
    slot = tl.arange(0, WM)
    edge = tl.load(boundary + state * SLOTS + slot, mask=slot < SLOTS, other=float("-inf"))
    weight = tl.where(remains[:, None], fade(s_tile, edge[None, :]), 0.0)
    memory += state * SLOTS * DX
    count = length - chunk * CHUNK

    # What the state at the chunk's end passes back: UK^T a_j, or UK k_j and Uc for ds.
    own = load_rows(x + batch * xb + head * xh + begin * xt, xt, valid, CHUNK, DX, WX, True)
    if MASS:
        total = weight * tl.load(memory + slot, mask=slot < SLOTS, other=0.0)[None, :]
    elif CONTROL:
        total = weight * against_memory(own, memory, SLOTS, WM, DX, WX)
    else:
        total = from_memory(weight, memory, SLOTS, WM, DX, WX, own.dtype)
    # What the chunk's own queries pass back, over all query heads that share the key head.
    for i in range(group):
        reader = (batch * head_count + head) * group + i
        mixed = load_rows(y + (reader * length + begin) * SLOTS, SLOTS, valid, CHUNK, SLOTS, WM, True)
        if MASS:
            total += recall(
                meets.to(tl.float32), mixed, z_rows, s_tile, z_tile, row, count, SLOTS, WM, LEVELS, own.dtype
            )
        else:
            reads = read_by + batch * rb + (head * group + i) * rh + begin * rt
            other = load_rows(reads, rt, valid, CHUNK, DX, WX, True)
            if CONTROL:
                scores = tl.where(meets, tl.dot(other, tl.trans(own), input_precision="ieee"), 0.0)
                total += recall(scores, mixed, z_rows, s_tile, z_tile, row, count, SLOTS, WM, LEVELS, own.dtype)
            else:
                pairs = spread(mixed, z_rows, s_tile, z_tile, row, count, SLOTS, WM, LEVELS, own.dtype)
                pairs, top = narrow(tl.where(meets, pairs, 0.0), own.dtype)
                total += tl.dot(tl.trans(pairs), other, input_precision="ieee") * top
    place = tl.program_id(1).to(tl.int64) * length + begin
    if MASS:
        total = -total
    if CONTROL:
        if not FIRST:
            total += load_rows(out + place * SLOTS, SLOTS, inside, CHUNK, SLOTS, WM, True)
        store_rows(out + place * SLOTS, SLOTS, total, inside, CHUNK, SLOTS, WM)
    else:
        store_rows(out + place * DX, DX, total, inside, CHUNK, DX, WX)
