"""Forward: one launch merges one block of keys and values into the running (out, lse) of this rank's queries.

A program computes a tile of queries of one head. Its online softmax starts from the result of earlier ring steps (top =
lse, total = 1, acc = out), so there is no partial result and no merge pass. Per span of keys it runs two loops: over
tiles that are visible as a whole, without a mask, and then over the few at the edges. Formulas: README.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import hash_rows, kept, load_ids, load_rows, load_tile, logits, store_rows


@triton.jit
def _meet(
    acc, top, total, query, q_ids, row, row_index, row_hash, j,
    k_head, v_head, k_ids, kt, vt, near, far, offset, valid, start, stride,
    scale, cap, slope, threshold, boost, k_tiles, v_tiles, batch, kv_head,
    STEP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, MASKED: tl.constexpr,
    DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, POSITIVE: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Merge one tile of keys into (acc, top, total): one step of the online softmax."""
    col = j * STEP + tl.arange(0, STEP)
    inside = col < valid
    if DESCRIBED and not MASKED:  # a tile at an edge may end in padding, which must not be read
        key = load_tile(k_tiles, batch, kv_head, offset + j * STEP, STEP, WK)
        value = load_tile(v_tiles, batch, kv_head, offset + j * STEP, STEP, WV)
    else:
        at = (offset + j * STEP).to(tl.int64)
        key = load_rows(k_head + at * kt, kt, inside, STEP, DK, WK, MASKED)
        value = load_rows(v_head + at * vt, vt, inside, STEP, DV, WV, MASKED)
    qk = tl.dot(query, tl.trans(key), input_precision="ieee")
    index = start + stride * col
    if POSITIVE and not (MASKED or SOFTCAP or ALIBI):  # scale in the exponent: one fused multiply-add
        new_top = tl.maximum(top, tl.max(qk, 1) * scale)
        base = new_top
        p = tl.exp2(qk * scale - base[:, None])
    else:
        scores, _ = logits(qk, row_index[:, None] - index[None, :], scale, cap, slope, SOFTCAP, ALIBI)
        if MASKED:
            across = row[:, None] - col[None, :]
            visible = (across >= near) & (across <= far) & inside[None, :]
            if DOCUMENTS:
                visible &= q_ids[:, None] == load_ids(k_ids + offset + col, inside, -2)[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key keeps (0, -inf)
        p = tl.exp2(scores - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept(row_hash[:, None], index[None, :], threshold), p * boost, 0.0)
    acc = tl.dot(p.to(value.dtype), value, acc * fade[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit(do_not_specialize=["threshold"])
def forward_kernel(
    q, k, v, k_tiles, v_tiles, out, lse, heads, entries, q_documents, k_documents, slopes, seeds,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, lb, lh,
    entry_batch, q_length, k_length, head_count, group, spans, stride, scale, cap, threshold, boost,
    TILE: tl.constexpr, STEP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    FIRST: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    POSITIVE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, B * H). q, k, v have the strides given and a dense last dimension; out, lse are fp32. k_tiles,
    v_tiles: if DESCRIBED, descriptors of k and v with tiles of (STEP, WK) and (STEP, WV)."""
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
    out += batch * ob + head.to(tl.int64) * oh + begin * ot
    lse += batch * lb + head.to(tl.int64) * lh + begin
    if FIRST:
        top = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        acc = tl.zeros([TILE, WV], tl.float32)
    else:
        # In units of log2(e); the earlier result has weight 1 at the maximum lse.
        top = tl.load(lse + row, mask=inside, other=float("-inf")) * 1.4426950408889634
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        acc = load_rows(out, ot, inside, TILE, DV, WV, True)

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
            acc, top, total = _meet(
                acc, top, total, query, q_ids, row, row_index, row_hash, j,
                k_head, v_head, k_documents, kt, vt, near, far, offset, valid, start, stride,
                scale, cap, slope, threshold, boost, k_tiles, v_tiles, batch, kv_head,
                STEP, DK, DV, WK, WV, False, DOCUMENTS, SOFTCAP, ALIBI, DROPOUT, POSITIVE, DESCRIBED,
            )  # fmt: skip
        # The tiles at the edges, [lo, full_lo) and [full_hi, hi), need one.
        for t in range(lo, hi - (full_hi - full_lo)):
            j = tl.where(t < full_lo, t, t + full_hi - full_lo)
            acc, top, total = _meet(
                acc, top, total, query, q_ids, row, row_index, row_hash, j,
                k_head, v_head, k_documents, kt, vt, near, far, offset, valid, start, stride,
                scale, cap, slope, threshold, boost, k_tiles, v_tiles, batch, kv_head,
                STEP, DK, DV, WK, WV, True, DOCUMENTS, SOFTCAP, ALIBI, DROPOUT, POSITIVE, DESCRIBED,
            )  # fmt: skip
        entry += 9

    # Normalise; rows that have seen no key become (0, -inf).
    seen = inside & (total > 0.0)
    share = tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)
    acc = tl.where(seen[:, None], acc * share[:, None], 0.0)
    lse_row = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453, float("-inf"))
    written = row < count if FIRST else inside
    store_rows(out, ot, acc, written, TILE, DV, WV)
    tl.store(lse + row, lse_row, mask=written)
