"""Forward: one launch merges one block of keys and values into the running (out, lse) of this rank's queries.

A program computes a tile of queries of one head. Its online softmax starts from the result of earlier ring steps (m_i =
lse, l_i = 1, acc = out), so there is no partial result and no merge pass; acc is normalised only there and at the end.
Per span of keys it runs two loops: over tiles that are visible as a whole, without a mask, and then over the few at the
edges. Equations: docs/methods/blockwise.md "Forward". Names and which launch fills which parameter: README.md.
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
    acc, m_i, l_i, query, q_ids, row, row_index, row_hash, j,
    k_head, v_head, k_ids, kt, vt, low, high, offset, valid, start, stride,
    scale, cap, slope, threshold, keep_scale, k_tiles, v_tiles, batch, kv_head,
    COLS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, MASKED: tl.constexpr,
    DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Merge one tile of keys into (acc, m_i, l_i): one step of the online softmax.

    query (ROWS, WK), key (COLS, WK), value (COLS, WV), p (ROWS, COLS), acc (ROWS, WV); m_i, l_i, alpha (ROWS,).
    """
    col = j * COLS + tl.arange(0, COLS)
    inside = col < valid
    # Whole tiles go through descriptors. Edge tiles may end in padding, which a descriptor cannot mask, so they are
    # loaded row by row.
    if DESCRIBED and not MASKED:
        key = load_tile(k_tiles, batch, kv_head, offset + j * COLS, COLS, WK)
        value = load_tile(v_tiles, batch, kv_head, offset + j * COLS, COLS, WV)
    else:
        at = (offset + j * COLS).to(tl.int64)
        key = load_rows(k_head + at * kt, kt, inside, COLS, DK, WK, MASKED)
        value = load_rows(v_head + at * vt, vt, inside, COLS, DV, WV, MASKED)
    qk = tl.dot(query, tl.trans(key), input_precision="ieee")
    index = start + stride * col
    if POSITIVE_SCALE and not (MASKED or SOFTCAP or ALIBI):  # scale in the exponent: one fused multiply-add
        m_new = tl.maximum(m_i, tl.max(qk, 1) * scale)
        m_safe = m_new
        p = tl.exp2(qk * scale - m_safe[:, None])
    else:
        scores, _ = logits(qk, row_index[:, None] - index[None, :], scale, cap, slope, SOFTCAP, ALIBI)
        if MASKED:
            row_minus_col = row[:, None] - col[None, :]
            visible = (row_minus_col >= low) & (row_minus_col <= high) & inside[None, :]
            if DOCUMENTS:
                visible &= q_ids[:, None] == load_ids(k_ids + offset + col, inside, -2)[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key keeps (0, -inf)
        p = tl.exp2(scores - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    l_i = l_i * alpha + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept(row_hash[:, None], index[None, :], threshold), p * keep_scale, 0.0)
    acc = tl.dot(p.to(value.dtype), value, acc * alpha[:, None], input_precision="ieee")
    return acc, m_new, l_i


@triton.jit(do_not_specialize=["threshold"])
def forward_kernel(
    q, k, v, k_tiles, v_tiles, out, lse, headers, ranges, q_documents, k_documents, slopes, seeds,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, lb, lh,
    range_batch, q_length, k_length, head_count, group, spans, stride, scale, cap, threshold, keep_scale,
    ROWS: tl.constexpr, COLS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    FIRST: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, B * H). q, k, v have the strides given and a dense last dimension; out, lse (natural logarithm)
    are fp32. k_tiles, v_tiles: if DESCRIBED, descriptors of k and v with tiles of (COLS, WK) and (COLS, WV)."""
    tile = tl.program_id(0)
    batch = (tl.program_id(1) // head_count).to(tl.int64)
    head = tl.program_id(1) % head_count
    begin, row_count, valid_rows, first_index = load_header(headers, tile)
    row = tl.arange(0, ROWS)
    row_index = first_index + stride * row
    inside = row < valid_rows

    query = load_rows(q + batch * qb + head.to(tl.int64) * qh + begin * qt, qt, inside, ROWS, DK, WK, True)
    out += batch * ob + head.to(tl.int64) * oh + begin * ot
    lse += batch * lb + head.to(tl.int64) * lh + begin
    if FIRST:
        m_i = tl.full([ROWS], float("-inf"), tl.float32)
        l_i = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, WV], tl.float32)
    else:
        # m_i in base 2, as all logits here. The earlier result has weight 1 at the maximum m_i = lse.
        m_i = tl.load(lse + row, mask=inside, other=float("-inf")) * 1.4426950408889634
        l_i = tl.where(m_i == float("-inf"), 0.0, 1.0)
        acc = load_rows(out, ot, inside, ROWS, DV, WV, True)

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
            acc, m_i, l_i = _add_keys(
                acc, m_i, l_i, query, q_ids, row, row_index, row_hash, j,
                k_head, v_head, k_documents, kt, vt, low, high, offset, valid, start, stride,
                scale, cap, slope, threshold, keep_scale, k_tiles, v_tiles, batch, kv_head,
                COLS, DK, DV, WK, WV, False, DOCUMENTS, SOFTCAP, ALIBI, DROPOUT, POSITIVE_SCALE, DESCRIBED,
            )  # fmt: skip
        # The tiles at the edges, [first_tile, first_full) and [end_full, end_tile), need one.
        for t in range(first_tile, end_tile - (end_full - first_full)):
            j = tl.where(t < first_full, t, t + end_full - first_full)
            acc, m_i, l_i = _add_keys(
                acc, m_i, l_i, query, q_ids, row, row_index, row_hash, j,
                k_head, v_head, k_documents, kt, vt, low, high, offset, valid, start, stride,
                scale, cap, slope, threshold, keep_scale, k_tiles, v_tiles, batch, kv_head,
                COLS, DK, DV, WK, WV, True, DOCUMENTS, SOFTCAP, ALIBI, DROPOUT, POSITIVE_SCALE, DESCRIBED,
            )  # fmt: skip
        at_range += RANGE

    # Normalise; rows that have seen no key become (0, -inf).
    seen = inside & (l_i > 0.0)
    inverse_l = tl.where(seen, 1.0 / tl.where(seen, l_i, 1.0), 0.0)
    acc = tl.where(seen[:, None], acc * inverse_l[:, None], 0.0)
    lse_row = tl.where(seen, (m_i + tl.log2(tl.where(seen, l_i, 1.0))) * 0.6931471805599453, float("-inf"))
    written = row < row_count if FIRST else inside
    store_rows(out, ot, acc, written, ROWS, DV, WV)
    tl.store(lse + row, lse_row, mask=written)
