"""Backward, second pass: dK and dV. A program computes a tile of keys of one key head and loops over its queries.

The table's rows are keys here, its columns queries. Scores are transposed, (keys, queries), so that P^T and dS^T are
left factors without a transpose:

    dV = P^T dO,    dP^T = V dO^T,    dS^T = P^T * (dP^T - delta),    dK = dS^T Q

The query heads that share the key head are summed in registers, in order: K and V are never repeated in memory, there
are no atomics, and dK and dV are written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import (
    RANGE,
    hash_rows,
    kept,
    load_header,
    load_ids,
    load_range,
    load_rows,
    load_tile,
    logits,
    store_rows,
)


@triton.jit
def _add_queries(
    dk, dv, key, value, k_ids, row, row_index, j, q_head, dout_head, lse2, delta, q_ids, qt, dot,
    low, high, offset, valid, start, stride, seed, head, scale, cap, slope, threshold, keep_scale,
    q_tiles, dout_tiles, batch,
    COLS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, MASKED: tl.constexpr,
    DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to dk (ROWS, WK) and dv (ROWS, WV). query (COLS, WK), dout (COLS, WV), p, ds (ROWS,
    COLS)."""
    col = j * COLS + tl.arange(0, COLS)
    inside = col < valid
    if DESCRIBED and not MASKED:
        query = load_tile(q_tiles, batch, head, offset + j * COLS, COLS, WK)
        dout = load_tile(dout_tiles, batch, head, offset + j * COLS, COLS, WV)
    else:
        at = (offset + j * COLS).to(tl.int64)
        query = load_rows(q_head + at * qt, qt, inside, COLS, DK, WK, MASKED)
        dout = load_rows(dout_head + at * dot, dot, inside, COLS, DV, WV, MASKED)
    if MASKED:
        own_lse = tl.load(lse2 + offset + col, mask=inside, other=float("inf"))
        own_delta = tl.load(delta + offset + col, mask=inside, other=0.0)
    else:
        own_lse = tl.load(lse2 + offset + col)
        own_delta = tl.load(delta + offset + col)
    index = start + stride * col
    kq = tl.dot(key, tl.trans(query), input_precision="ieee")
    scores, tanh_x = logits(kq, row_index[:, None] - index[None, :], scale, cap, slope, SOFTCAP, ALIBI)
    p = tl.exp2(scores - own_lse[None, :])
    if MASKED:
        row_minus_col = row[:, None] - col[None, :]
        visible = (row_minus_col >= low) & (row_minus_col <= high) & inside[None, :]
        if DOCUMENTS:
            visible &= k_ids[:, None] == load_ids(q_ids + offset + col, inside, -1)[None, :]
        p = tl.where(visible, p, 0.0)
    dp = tl.dot(value, tl.trans(dout), input_precision="ieee")
    dropped = p
    if DROPOUT:
        keep = kept(hash_rows(seed, head, index)[None, :], row_index[:, None], threshold)
        dropped = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision="ieee")
    ds = p * (dp - own_delta[None, :])
    if SOFTCAP:
        ds *= 1.0 - tanh_x * tanh_x
    dk = tl.dot(ds.to(query.dtype), query, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["threshold"])
def keys_kernel(
    q, k, v, dout, q_tiles, dout_tiles, lse2, delta, dk, dv, headers, ranges, q_documents, k_documents, slopes, seeds,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, dob, doh, dot, dkb, dkh, dkt, dvb, dvh, dvt,
    range_batch, q_length, k_length, kv_head_count, group, spans, stride, scale, cap, threshold, keep_scale, grad_scale,
    ROWS: tl.constexpr, COLS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, B * G). dk and dv are fp32; `grad_scale` is the factor of dK: the softmax scale. q_tiles,
    dout_tiles: if DESCRIBED, descriptors of q and dout with tiles of (COLS, WK) and (COLS, WV). Names: README.md."""
    tile = tl.program_id(0)
    batch = (tl.program_id(1) // kv_head_count).to(tl.int64)
    kv_head = tl.program_id(1) % kv_head_count
    begin, row_count, valid_rows, first_index = load_header(headers, tile)
    row = tl.arange(0, ROWS)
    row_index = first_index + stride * row
    inside = row < valid_rows

    key = load_rows(k + batch * kb + kv_head.to(tl.int64) * kh + begin * kt, kt, inside, ROWS, DK, WK, True)
    value = load_rows(v + batch * vb + kv_head.to(tl.int64) * vh + begin * vt, vt, inside, ROWS, DV, WV, True)
    dk_acc = tl.zeros([ROWS, WK], tl.float32)
    dv_acc = tl.zeros([ROWS, WV], tl.float32)
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
        dout_head = dout + batch * dob + head.to(tl.int64) * doh
        head_start = (batch * kv_head_count * group + head) * q_length
        at_range = ranges + batch * range_batch + tile * spans * RANGE
        for _ in range(spans):
            first_tile, first_full, end_full, end_tile, low, high, offset, valid, start = load_range(at_range)
            # Tiles that are visible as a whole need no mask.
            for j in range(first_full, end_full):
                dk_acc, dv_acc = _add_queries(
                    dk_acc, dv_acc, key, value, k_ids, row, row_index, j,
                    q_head, dout_head, lse2 + head_start, delta + head_start, q_documents, qt, dot,
                    low, high, offset, valid, start, stride, seed, head, scale, cap, slope, threshold, keep_scale,
                    q_tiles, dout_tiles, batch,
                    COLS, DK, DV, WK, WV, False, DOCUMENTS, SOFTCAP, ALIBI, DROPOUT, DESCRIBED,
                )  # fmt: skip
            # The tiles at the edges, [first_tile, first_full) and [end_full, end_tile), need one.
            for t in range(first_tile, end_tile - (end_full - first_full)):
                j = tl.where(t < first_full, t, t + end_full - first_full)
                dk_acc, dv_acc = _add_queries(
                    dk_acc, dv_acc, key, value, k_ids, row, row_index, j,
                    q_head, dout_head, lse2 + head_start, delta + head_start, q_documents, qt, dot,
                    low, high, offset, valid, start, stride, seed, head, scale, cap, slope, threshold, keep_scale,
                    q_tiles, dout_tiles, batch,
                    COLS, DK, DV, WK, WV, True, DOCUMENTS, SOFTCAP, ALIBI, DROPOUT, DESCRIBED,
                )  # fmt: skip
            at_range += RANGE

    dk += batch * dkb + kv_head.to(tl.int64) * dkh + begin * dkt
    dv += batch * dvb + kv_head.to(tl.int64) * dvh + begin * dvt
    store_rows(dk, dkt, tl.where(inside[:, None], dk_acc * grad_scale, 0.0), row < row_count, ROWS, DK, WK)
    store_rows(dv, dvt, tl.where(inside[:, None], dv_acc, 0.0), row < row_count, ROWS, DV, WV)
