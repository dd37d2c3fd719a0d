"""ABC for queries: logits against the state of keys, softmax over slots, output from the state of values; and backward.

With w the weights of pairs.py, K0, V0 the state before the chunk and fade_t = exp(z before the chunk - z_t),

    l_t = scale (fade_t K0 q_t + sum_j w_tj (q_t . k_j))      p = softmax(l)
    o_t = (fade p)^T V0 + sum_j (p . w_tj) v_j
    dp_t = fade_t V0 dO_t + sum_j w_tj (dO_t . v_j)           dl = p (dp - p . dp)          g = scale dl
    dq_t = (fade g)^T K0 + sum_j (g . w_tj) k_j               c = dl l + p dp
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..cosine.numbers import narrow
from ..flash.elements import load_rows, store_rows
from .pairs import fade, load_slots, read, spread


@triton.jit
def against_memory(x, memory, SLOTS: tl.constexpr, WM: tl.constexpr, DX: tl.constexpr, WX: tl.constexpr):
    """Return x memory^T (C, WM) of x (C, WX) and a state (M, DX)."""
    slot = tl.arange(0, WM)
    tile, top = narrow(load_rows(memory, DX, slot < SLOTS, WM, DX, WX, True), x.dtype)
    return tl.dot(x, tl.trans(tile), input_precision="ieee") * top


@triton.jit
def from_memory(
    y, memory, SLOTS: tl.constexpr, WM: tl.constexpr, DX: tl.constexpr, WX: tl.constexpr, TYPE: tl.constexpr
):
    """Return y memory (C, WX) of y (C, WM) and a state (M, DX)."""
    slot = tl.arange(0, WM)
    tile, top = narrow(load_rows(memory, DX, slot < SLOTS, WM, DX, WX, True), TYPE)
    left, high = narrow(y, TYPE)
    return tl.dot(left, tile, input_precision="ieee") * (top * high)


@triton.jit
def rows_kernel(
    q, k, v, s, z, boundary, keys, values, ids, edges, out, dout, dq, p_out, g_out, c_out,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, sb, sh, st, ob, oh, ot, head_count, group, length, chunks, scale,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, SLOTS: tl.constexpr, WM: tl.constexpr, DK: tl.constexpr,
    WK: tl.constexpr, DV: tl.constexpr, WV: tl.constexpr, DOCUMENTS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, B * H). keys, values (B, G, chunks + 1, M, D), z (B, G, T, M), boundary (B, G, chunks + 1, M),
    p_out, g_out, c_out (B, H, T, M): fp32, dense. Forward writes out. BACKWARD reads dout, which has out's strides, and
    writes dq (B, H, T, DK), dense, p_out, g_out and c_out."""
    chunk = tl.program_id(0)
    batch = (tl.program_id(1) // head_count).to(tl.int64)
    head = (tl.program_id(1) % head_count).to(tl.int64)
    kv_head = head // group
    state = (batch * (head_count // group) + kv_head) * (chunks + 1) + chunk
    begin = (chunk * CHUNK).to(tl.int64)
    row = tl.arange(0, CHUNK)
    inside = begin + row < length
    valid = inside
    remembers = inside
    meets = row[:, None] >= row[None, :]
    if DOCUMENTS:
        document = tl.load(ids + batch * length + begin + row, mask=inside, other=-1)
        valid = document >= 0
        meets &= (document[:, None] == document[None, :]) & valid[:, None]
        remembers = valid & (document == tl.load(edges + batch * (chunks + 1) + chunk))
    s_tile = load_slots(s + batch * sb + kv_head * sh + begin * st, st, row, valid, SLOTS, WM)
    z_rows = z + ((batch * (head_count // group) + kv_head) * length + begin) * SLOTS
    z_tile = load_slots(z_rows, SLOTS, row, valid, SLOTS, WM)
    slot = tl.arange(0, WM)
    edge = tl.load(boundary + state * SLOTS + slot, mask=slot < SLOTS, other=float("-inf"))
    past = tl.where(remembers[:, None], fade(edge[None, :], z_tile), 0.0)
    keys += state * SLOTS * DK
    values += state * SLOTS * DV
    count = length - chunk * CHUNK

    # l_t: the state before the chunk, then the chunk's own tokens.
    query = load_rows(q + batch * qb + head * qh + begin * qt, qt, valid, CHUNK, DK, WK, True)
    key = load_rows(k + batch * kb + kv_head * kh + begin * kt, kt, valid, CHUNK, DK, WK, True)
    scores = tl.where(meets, tl.dot(query, tl.trans(key), input_precision="ieee"), 0.0)
    logits = past * against_memory(query, keys, SLOTS, WM, DK, WK)
    logits += read(scores, z_rows, s_tile, z_tile, row, count, SLOTS, WM, LEVELS, query.dtype)
    # Softmax over the written slots; a row without any gets p = 0.
    seen = z_tile > float("-inf")
    logits = tl.where(seen, logits * scale, float("-inf"))
    top = tl.max(logits, 1)
    p = tl.exp(logits - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(p, 1)
    p /= tl.where(total > 0.0, total, 1.0)[:, None]

    value = load_rows(v + batch * vb + kv_head * vh + begin * vt, vt, valid, CHUNK, DV, WV, True)
    if not BACKWARD:
        mixed = tl.where(meets, spread(p, z_rows, s_tile, z_tile, row, count, SLOTS, WM, LEVELS, query.dtype), 0.0)
        pairs, high = narrow(mixed, query.dtype)
        found = tl.dot(pairs, value, input_precision="ieee") * high
        found += from_memory(past * p, values, SLOTS, WM, DV, WV, query.dtype)
        store_rows(out + batch * ob + head * oh + begin * ot, ot, found, inside, CHUNK, DV, WV)
    else:
        given = load_rows(dout + batch * ob + head * oh + begin * ot, ot, valid, CHUNK, DV, WV, True)
        met = tl.where(meets, tl.dot(given, tl.trans(value), input_precision="ieee"), 0.0)
        dp = past * against_memory(given, values, SLOTS, WM, DV, WV)
        dp += read(met, z_rows, s_tile, z_tile, row, count, SLOTS, WM, LEVELS, query.dtype)
        pdp = p * dp
        dl = pdp - p * tl.sum(pdp, 1)[:, None]
        g = dl * scale
        c = pdp + dl * tl.where(seen, logits, 0.0)
        own = (tl.program_id(1).to(tl.int64) * length + begin) * SLOTS
        store_rows(p_out + own, SLOTS, p, inside, CHUNK, SLOTS, WM)
        store_rows(g_out + own, SLOTS, g, inside, CHUNK, SLOTS, WM)
        store_rows(c_out + own, SLOTS, c, inside, CHUNK, SLOTS, WM)
        mixed = tl.where(meets, spread(g, z_rows, s_tile, z_tile, row, count, SLOTS, WM, LEVELS, query.dtype), 0.0)
        pairs, high = narrow(mixed, query.dtype)
        found = tl.dot(pairs, key, input_precision="ieee") * high
        found += from_memory(past * g, keys, SLOTS, WM, DK, WK, query.dtype)
        at = dq + (tl.program_id(1).to(tl.int64) * length + begin) * DK
        store_rows(at, DK, found, inside, CHUNK, DK, WK)
