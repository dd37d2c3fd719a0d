"""Backward, second pass: dK and dV. A program computes a tile of keys of one key head and loops over its queries.

Scores are transposed, (keys, queries), so that P^T and dS^T are left factors without a transpose:

    dV = P^T dO,    dP^T = V dO^T,    dS^T = P^T * (dP^T - delta),    dK = dS^T Q

The query heads that share the key head are summed in registers, in order: K and V are never repeated in memory, there
are no atomics, and dK and dV are written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import hash_rows, kept, load_ids, load_rows, load_tile, logits, store_rows


@triton.jit
def _meet(
    dk, dv, key, value, k_ids, row, row_index, j, q_head, g_head, lse2, delta, q_ids, qt, gt,
    near, far, offset, valid, start, stride, seed, head, scale, cap, slope, threshold, boost, q_tiles, g_tiles, batch,
    STEP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, MASKED: tl.constexpr,
    DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to dk and dv. Rows are keys, columns are queries."""
    col = j * STEP + tl.arange(0, STEP)
    inside = col < valid
    if DESCRIBED and not MASKED:
        query = load_tile(q_tiles, batch, head, offset + j * STEP, STEP, WK)
        dout = load_tile(g_tiles, batch, head, offset + j * STEP, STEP, WV)
    else:
        at = (offset + j * STEP).to(tl.int64)
        query = load_rows(q_head + at * qt, qt, inside, STEP, DK, WK, MASKED)
        dout = load_rows(g_head + at * gt, gt, inside, STEP, DV, WV, MASKED)
    if MASKED:
        own_lse = tl.load(lse2 + offset + col, mask=inside, other=float("inf"))
        own_delta = tl.load(delta + offset + col, mask=inside, other=0.0)
    else:
        own_lse = tl.load(lse2 + offset + col)
        own_delta = tl.load(delta + offset + col)
    index = start + stride * col
    kq = tl.dot(key, tl.trans(query), input_precision="ieee")
    scores, bent = logits(kq, row_index[:, None] - index[None, :], scale, cap, slope, SOFTCAP, ALIBI)
    p = tl.exp2(scores - own_lse[None, :])
    if MASKED:
        across = row[:, None] - col[None, :]
        visible = (across >= near) & (across <= far) & inside[None, :]
        if DOCUMENTS:
            visible &= k_ids[:, None] == load_ids(q_ids + offset + col, inside, -1)[None, :]
        p = tl.where(visible, p, 0.0)
    dp = tl.dot(value, tl.trans(dout), input_precision="ieee")
    dropped = p
    if DROPOUT:
        keep = kept(hash_rows(seed, head, index)[None, :], row_index[:, None], threshold)
        dropped = tl.where(keep, p * boost, 0.0)
        dp = tl.where(keep, dp * boost, 0.0)
    dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision="ieee")
    ds = p * (dp - own_delta[None, :])
    if SOFTCAP:
        ds *= 1.0 - bent * bent
    dk = tl.dot(ds.to(query.dtype), query, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["threshold"])
def keys_kernel(
    q, k, v, dout, q_tiles, g_tiles, lse2, delta, dk, dv, heads, entries, q_documents, k_documents, slopes, seeds,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, ab, ah, at, bb, bh, bt,
    entry_batch, q_length, k_length, kv_head_count, group, spans, stride, scale, cap, threshold, boost, outer,
    TILE: tl.constexpr, STEP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, B * G), with keys as the table's rows. dk (strides a), dv (strides b) are fp32. q_tiles,
    g_tiles: if DESCRIBED, descriptors of q and dout with tiles of (STEP, WK) and (STEP, WV)."""
    tile = tl.program_id(0)
    batch = (tl.program_id(1) // kv_head_count).to(tl.int64)
    kv_head = tl.program_id(1) % kv_head_count
    begin = tl.load(heads + tile * 4).to(tl.int64)
    count = tl.load(heads + tile * 4 + 1)
    taking_part = tl.load(heads + tile * 4 + 2)
    row = tl.arange(0, TILE)
    row_index = tl.load(heads + tile * 4 + 3) + stride * row
    inside = row < taking_part

    key = load_rows(k + batch * kb + kv_head.to(tl.int64) * kh + begin * kt, kt, inside, TILE, DK, WK, True)
    value = load_rows(v + batch * vb + kv_head.to(tl.int64) * vh + begin * vt, vt, inside, TILE, DV, WV, True)
    dk_acc = tl.zeros([TILE, WK], tl.float32)
    dv_acc = tl.zeros([TILE, WV], tl.float32)
    seed = 0
    if DROPOUT:
        seed = tl.load(seeds + batch)
    k_ids = row
    if DOCUMENTS:
        k_ids = load_ids(k_documents + batch * k_length + begin + row, inside, -2)
        q_documents += batch * q_length
    for member in range(group):
        head = kv_head * group + member
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + head) * 1.4426950408889634
        q_head = q + batch * qb + head.to(tl.int64) * qh
        g_head = dout + batch * gb + head.to(tl.int64) * gh
        at_head = (batch * kv_head_count * group + head) * q_length
        entry = entries + batch * entry_batch + tile * spans * 9
        for _ in range(spans):
            lo = tl.load(entry)
            full_lo = tl.load(entry + 1)
            full_hi = tl.load(entry + 2)
            hi = tl.load(entry + 3)
            near = tl.load(entry + 4)
            far = tl.load(entry + 5)
            offset = tl.load(entry + 6)
            valid = tl.load(entry + 7)
            start = tl.load(entry + 8)
            # Tiles that are visible as a whole need no mask.
            for j in range(full_lo, full_hi):
                dk_acc, dv_acc = _meet(
                    dk_acc, dv_acc, key, value, k_ids, row, row_index, j,
                    q_head, g_head, lse2 + at_head, delta + at_head, q_documents, qt, gt,
                    near, far, offset, valid, start, stride, seed, head, scale, cap, slope, threshold, boost,
                    q_tiles, g_tiles, batch,
                    STEP, DK, DV, WK, WV, False, DOCUMENTS, SOFTCAP, ALIBI, DROPOUT, DESCRIBED,
                )  # fmt: skip
            # The tiles at the edges, [lo, full_lo) and [full_hi, hi), need one.
            for t in range(lo, hi - (full_hi - full_lo)):
                j = tl.where(t < full_lo, t, t + full_hi - full_lo)
                dk_acc, dv_acc = _meet(
                    dk_acc, dv_acc, key, value, k_ids, row, row_index, j,
                    q_head, g_head, lse2 + at_head, delta + at_head, q_documents, qt, gt,
                    near, far, offset, valid, start, stride, seed, head, scale, cap, slope, threshold, boost,
                    q_tiles, g_tiles, batch,
                    STEP, DK, DV, WK, WV, True, DOCUMENTS, SOFTCAP, ALIBI, DROPOUT, DESCRIBED,
                )  # fmt: skip
            entry += 9

    dk += batch * ab + kv_head.to(tl.int64) * ah + begin * at
    dv += batch * bb + kv_head.to(tl.int64) * bh + begin * bt
    store_rows(dk, at, tl.where(inside[:, None], dk_acc * outer, 0.0), row < count, TILE, DK, WK)
    store_rows(dv, bt, tl.where(inside[:, None], dv_acc, 0.0), row < count, TILE, DV, WV)
