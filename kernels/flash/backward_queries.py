"""Backward, first pass: dQ. A program computes a tile of queries of one head and loops over keys as forward does.

    P = exp(S - lse),   dP = keep / (1 - p) * (dO V^T),   dS = P * (dP - delta),   dQ += dS K

Each program adds only to its own rows: there are no atomics, so the result is reproducible.
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
def _add_keys(
    dq, dslope, query, dout, lse2, delta, q_ids, row, row_index, row_hash, j,
    k_head, v_head, k_ids, kt, vt, low, high, offset, valid, start, stride,
    scale, cap, slope, threshold, keep_scale, k_tiles, v_tiles, batch, kv_head,
    COLS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, MASKED: tl.constexpr,
    DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to dq (ROWS, WK) and to the gradient of the slope (ROWS,). key (COLS, WK), value (COLS, WV),
    p, ds (ROWS, COLS)."""
    col = j * COLS + tl.arange(0, COLS)
    inside = col < valid
    if DESCRIBED and not MASKED:
        key = load_tile(k_tiles, batch, kv_head, offset + j * COLS, COLS, WK)
        value = load_tile(v_tiles, batch, kv_head, offset + j * COLS, COLS, WV)
    else:
        at = (offset + j * COLS).to(tl.int64)
        key = load_rows(k_head + at * kt, kt, inside, COLS, DK, WK, MASKED)
        value = load_rows(v_head + at * vt, vt, inside, COLS, DV, WV, MASKED)
    index = start + stride * col
    distance = row_index[:, None] - index[None, :]
    qk = tl.dot(query, tl.trans(key), input_precision="ieee")
    scores, tanh_x = logits(qk, distance, scale, cap, slope, SOFTCAP, ALIBI)
    p = tl.exp2(scores - lse2[:, None])
    if MASKED:
        row_minus_col = row[:, None] - col[None, :]
        visible = (row_minus_col >= low) & (row_minus_col <= high) & inside[None, :]
        if DOCUMENTS:
            visible &= q_ids[:, None] == load_ids(k_ids + offset + col, inside, -2)[None, :]
        p = tl.where(visible, p, 0.0)
    dp = tl.dot(dout, tl.trans(value), input_precision="ieee")
    if DROPOUT:
        dp = tl.where(kept(row_hash[:, None], index[None, :], threshold), dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    if ALIBI:
        dslope += tl.sum(ds * tl.abs(distance).to(tl.float32), 1)
    if SOFTCAP:
        ds *= 1.0 - tanh_x * tanh_x
    dq = tl.dot(ds.to(key.dtype), key, dq, input_precision="ieee")
    return dq, dslope


@triton.jit(do_not_specialize=["threshold"])
def queries_kernel(
    q, k, v, k_tiles, v_tiles, dout, lse2, delta, dq, dslopes, headers, ranges, q_documents, k_documents, slopes, seeds,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, dob, doh, dot, dqb, dqh, dqt,
    range_batch, q_length, k_length, head_count, group, spans, stride, scale, cap, threshold, keep_scale, grad_scale,
    ROWS: tl.constexpr, COLS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    FIRST: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, B * H). dq is fp32; dslopes (B * H, row tiles) gets each program's part of sum(dS * |i - j|);
    `grad_scale` is the factor of dQ: the softmax scale. k_tiles, v_tiles as in forward. Names: README.md."""
    tile = tl.program_id(0)
    batch = (tl.program_id(1) // head_count).to(tl.int64)
    head = tl.program_id(1) % head_count
    begin, row_count, valid_rows, first_index = load_header(headers, tile)
    row = tl.arange(0, ROWS)
    row_index = first_index + stride * row
    inside = row < valid_rows

    query = load_rows(q + batch * qb + head.to(tl.int64) * qh + begin * qt, qt, inside, ROWS, DK, WK, True)
    do = load_rows(dout + batch * dob + head.to(tl.int64) * doh + begin * dot, dot, inside, ROWS, DV, WV, True)
    at = tl.program_id(1).to(tl.int64) * q_length + begin + row
    own_lse = tl.load(lse2 + at, mask=inside, other=float("inf"))
    own_delta = tl.load(delta + at, mask=inside, other=0.0)
    acc = tl.zeros([ROWS, WK], tl.float32)
    dslope = tl.zeros([ROWS], tl.float32)

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
    at_range = ranges + batch * range_batch + tile * spans * RANGE
    for _ in range(spans):
        first_tile, first_full, end_full, end_tile, low, high, offset, valid, start = load_range(at_range)
        # Tiles that are visible as a whole need no mask.
        for j in range(first_full, end_full):
            acc, dslope = _add_keys(
                acc, dslope, query, do, own_lse, own_delta, q_ids, row, row_index, row_hash, j,
                k_head, v_head, k_documents, kt, vt, low, high, offset, valid, start, stride,
                scale, cap, slope, threshold, keep_scale, k_tiles, v_tiles, batch, kv_head,
                COLS, DK, DV, WK, WV, False, DOCUMENTS, SOFTCAP, ALIBI, DROPOUT, DESCRIBED,
            )  # fmt: skip
        # The tiles at the edges, [first_tile, first_full) and [end_full, end_tile), need one.
        for t in range(first_tile, end_tile - (end_full - first_full)):
            j = tl.where(t < first_full, t, t + end_full - first_full)
            acc, dslope = _add_keys(
                acc, dslope, query, do, own_lse, own_delta, q_ids, row, row_index, row_hash, j,
                k_head, v_head, k_documents, kt, vt, low, high, offset, valid, start, stride,
                scale, cap, slope, threshold, keep_scale, k_tiles, v_tiles, batch, kv_head,
                COLS, DK, DV, WK, WV, True, DOCUMENTS, SOFTCAP, ALIBI, DROPOUT, DESCRIBED,
            )  # fmt: skip
        at_range += RANGE

    dq += batch * dqb + head.to(tl.int64) * dqh + begin * dqt
    acc = tl.where(inside[:, None], acc * grad_scale, 0.0)
    written = row < row_count if FIRST else inside
    if not FIRST:
        acc += load_rows(dq, dqt, inside, ROWS, DK, WK, True)
    store_rows(dq, dqt, acc, written, ROWS, DK, WK)
    if ALIBI:
        tl.store(dslopes + tl.program_id(1) * tl.num_programs(0) + tile, tl.sum(tl.where(inside, dslope, 0.0), 0))
