"""Backward, first pass: dQ. A program computes a tile of queries of one head and loops over keys as forward does.

    P = exp(S - lse),   dP = keep / (1 - p) * (dO V^T),   dS = P * (dP - delta),   dQ += dS K

Each program adds only to its own rows: there are no atomics, so the result is reproducible.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import hash_rows, kept, load_ids, load_rows, load_tile, logits, store_rows


@triton.jit
def _meet(
    dq, dslope, query, dout, lse2, delta, q_ids, row, row_index, row_hash, j,
    k_head, v_head, k_ids, kt, vt, near, far, offset, valid, start, stride,
    scale, cap, slope, threshold, boost, k_tiles, v_tiles, batch, kv_head,
    STEP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, MASKED: tl.constexpr,
    DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to dq and to the gradient of the slope."""
    col = j * STEP + tl.arange(0, STEP)
    inside = col < valid
    if DESCRIBED and not MASKED:
        key = load_tile(k_tiles, batch, kv_head, offset + j * STEP, STEP, WK)
        value = load_tile(v_tiles, batch, kv_head, offset + j * STEP, STEP, WV)
    else:
        at = (offset + j * STEP).to(tl.int64)
        key = load_rows(k_head + at * kt, kt, inside, STEP, DK, WK, MASKED)
        value = load_rows(v_head + at * vt, vt, inside, STEP, DV, WV, MASKED)
    index = start + stride * col
    distance = row_index[:, None] - index[None, :]
    qk = tl.dot(query, tl.trans(key), input_precision="ieee")
    scores, bent = logits(qk, distance, scale, cap, slope, SOFTCAP, ALIBI)
    p = tl.exp2(scores - lse2[:, None])
    if MASKED:
        across = row[:, None] - col[None, :]
        visible = (across >= near) & (across <= far) & inside[None, :]
        if DOCUMENTS:
            visible &= q_ids[:, None] == load_ids(k_ids + offset + col, inside, -2)[None, :]
        p = tl.where(visible, p, 0.0)
    dp = tl.dot(dout, tl.trans(value), input_precision="ieee")
    if DROPOUT:
        dp = tl.where(kept(row_hash[:, None], index[None, :], threshold), dp * boost, 0.0)
    ds = p * (dp - delta[:, None])
    if ALIBI:
        dslope += tl.sum(ds * tl.abs(distance).to(tl.float32), 1)
    if SOFTCAP:
        ds *= 1.0 - bent * bent
    dq = tl.dot(ds.to(key.dtype), key, dq, input_precision="ieee")
    return dq, dslope


@triton.jit(do_not_specialize=["threshold"])
def queries_kernel(
    q, k, v, k_tiles, v_tiles, dout, lse2, delta, dq, dslopes, heads, entries, q_documents, k_documents, slopes, seeds,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, ob, oh, ot,
    entry_batch, q_length, k_length, head_count, group, spans, stride, scale, cap, threshold, boost, outer,
    TILE: tl.constexpr, STEP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    FIRST: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, B * H). dq is fp32; dslopes (B * H, row tiles) gets each program's part of sum(dS * |i - j|);
    `outer` is the factor of dQ: the scale. k_tiles, v_tiles as in forward."""
    tile = tl.program_id(0)
    batch = (tl.program_id(1) // head_count).to(tl.int64)
    head = tl.program_id(1) % head_count
    begin = tl.load(heads + tile * 4).to(tl.int64)
    count = tl.load(heads + tile * 4 + 1)
    taking_part = tl.load(heads + tile * 4 + 2)
    row = tl.arange(0, TILE)
    row_index = tl.load(heads + tile * 4 + 3) + stride * row
    inside = row < taking_part

    query = load_rows(q + batch * qb + head.to(tl.int64) * qh + begin * qt, qt, inside, TILE, DK, WK, True)
    do = load_rows(dout + batch * gb + head.to(tl.int64) * gh + begin * gt, gt, inside, TILE, DV, WV, True)
    at = tl.program_id(1).to(tl.int64) * q_length + begin + row
    own_lse = tl.load(lse2 + at, mask=inside, other=float("inf"))
    own_delta = tl.load(delta + at, mask=inside, other=0.0)
    acc = tl.zeros([TILE, WK], tl.float32)
    dslope = tl.zeros([TILE], tl.float32)

    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + head) * 1.4426950408889634
    row_hash = row
    if DROPOUT:
        row_hash = hash_rows(tl.load(seeds + batch), head, row_index)
    q_ids = row
    if DOCUMENTS:
        q_ids = load_ids(q_documents + batch * q_length + begin + row, inside, -1)
        k_documents += batch * k_length
    kv_head = head // group
    k_head = k + batch * kb + kv_head.to(tl.int64) * kh
    v_head = v + batch * vb + kv_head.to(tl.int64) * vh
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
            acc, dslope = _meet(
                acc, dslope, query, do, own_lse, own_delta, q_ids, row, row_index, row_hash, j,
                k_head, v_head, k_documents, kt, vt, near, far, offset, valid, start, stride,
                scale, cap, slope, threshold, boost, k_tiles, v_tiles, batch, kv_head,
                STEP, DK, DV, WK, WV, False, DOCUMENTS, SOFTCAP, ALIBI, DROPOUT, DESCRIBED,
            )  # fmt: skip
        # The tiles at the edges, [lo, full_lo) and [full_hi, hi), need one.
        for t in range(lo, hi - (full_hi - full_lo)):
            j = tl.where(t < full_lo, t, t + full_hi - full_lo)
            acc, dslope = _meet(
                acc, dslope, query, do, own_lse, own_delta, q_ids, row, row_index, row_hash, j,
                k_head, v_head, k_documents, kt, vt, near, far, offset, valid, start, stride,
                scale, cap, slope, threshold, boost, k_tiles, v_tiles, batch, kv_head,
                STEP, DK, DV, WK, WV, True, DOCUMENTS, SOFTCAP, ALIBI, DROPOUT, DESCRIBED,
            )  # fmt: skip
        entry += 9

    dq += batch * ob + head.to(tl.int64) * oh + begin * ot
    acc = tl.where(inside[:, None], acc * outer, 0.0)
    written = row < count if FIRST else inside
    if not FIRST:
        acc += load_rows(dq, ot, inside, TILE, DK, WK, True)
    store_rows(dq, ot, acc, written, TILE, DK, WK)
    if ALIBI:
        tl.store(dslopes + tl.program_id(1) * tl.num_programs(0) + tile, tl.sum(tl.where(inside, dslope, 0.0), 0))
