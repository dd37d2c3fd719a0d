"""Attention of many queries to one split of a shared context: the online softmax of flash/forward.py, for few rows.

A program computes a tile of the rows that share a key head (heads x beams x new tokens) and loops over one split of the
context. Rows are wide (EL: the model's width; MLA: 576), so they are loaded in chunks of columns. If values are columns
of the keys and a tile of keys fits in shared memory (KEPT), the tile is loaded once and used for both products: the
context is read from memory once. Otherwise values are loaded separately, or the keys' tile again, from L2. Row tiles of
one split are adjacent in the grid, so that they share tiles in L2. Formulas: docs/methods/blockwise.md "Forward"
(m_i, l_i, alpha and acc are its m, l, α and unnormalised out), terms.py for the logit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..flash.elements import tanh


@triton.jit
def _columns(rows, valid, start, DIM: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Load (rows, WIDTH) from column `start` on; `rows` points to each row's first element; zeros beyond DIM."""
    column = start + tl.arange(0, WIDTH)
    if WHOLE:
        tile = tl.load(rows[:, None] + column[None, :], mask=valid[:, None], other=0.0)
    else:
        tile = tl.load(rows[:, None] + column[None, :], mask=valid[:, None] & (column < DIM)[None, :], other=0.0)
    return tile


@triton.jit
def partial_kernel(
    q, k, v, constant, factor, shift, slopes, bias, mask, lengths, out, lse,
    kb, kg, ks, vb, vg, vs, fb, fg, fn, fs, bb, bg, bo, bn, bt, bs, mb, mg, mo, mn, mt, ms,
    groups, rows, heads, tokens, keys, span, row_tiles, offset, scale, cap,
    ROWS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    KEY_CHUNKS: tl.constexpr, VALUE_CHUNKS: tl.constexpr, KEPT: tl.constexpr, UNROLLED: tl.constexpr,
    CONSTANT: tl.constexpr, FACTOR: tl.constexpr, SHIFT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, LENGTHS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles x column tiles, splits, B * G). Rows are (beams, heads of the group, tokens), flattened.

    q (B, G, rows, DK) dense; k (B, G, S, DK), v (B, G, S, DV): strides given, last dimension dense. constant, shift
    (B, G, rows) fp32; factor (B, G, heads, S); slopes (G, heads) fp32, times log2(e); bias, mask (bytes)
    (B, G, beams, heads, tokens, S) of any strides; lengths (B,) int32. out (B, G, splits, rows, DV), lse
    (B, G, splits, rows), fp32. cap is times log2(e); scale is divided by the cap if there is one, else times log2(e).
    """
    # Which tile of rows and columns, split, batch row and key head this program computes.
    row_tile = tl.program_id(0) % row_tiles
    column_tile = tl.program_id(0) // row_tiles
    split = tl.program_id(1)
    unit = tl.program_id(2).to(tl.int64)
    batch = unit // groups
    group = unit % groups

    # Rows are (beams, heads, tokens) flattened. Terms that do not depend on the key are loaded once.
    row = row_tile * ROWS + tl.arange(0, ROWS)
    row_valid = row < rows
    beam = (row // (heads * tokens)).to(tl.int64)
    head = (row // tokens % heads).to(tl.int64)
    token = row % tokens
    at_row = unit * rows + row
    q_rows = q + at_row * DK
    row_constant = tl.zeros([ROWS], tl.float32)
    if CONSTANT:
        row_constant = tl.load(constant + at_row, mask=row_valid, other=0.0)
    row_shift = tl.zeros([ROWS], tl.float32)
    if SHIFT:
        row_shift = tl.load(shift + at_row, mask=row_valid, other=0.0)
    slope = tl.zeros([ROWS], tl.float32)
    if ALIBI:
        slope = tl.load(slopes + group * heads + head, mask=row_valid, other=0.0)
    if FACTOR:
        factor += batch * fb + group * fg
    if BIAS:
        bias += batch * bb + group * bg
    if MASK:
        mask += batch * mb + group * mg
    k += batch * kb + group * kg
    v += batch * vb + group * vg

    # The keys of this split, without those that lengths and causality hide from every row.
    begin = split * span
    stop = tl.minimum(begin + span, keys)
    if LENGTHS:
        stop = tl.minimum(stop, tl.load(lengths + batch))
    if CAUSAL:
        stop = tl.minimum(stop, offset + tokens)

    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    acc = ()
    for _ in tl.static_range(VALUE_CHUNKS):
        acc = acc + (tl.zeros([ROWS, WIDTH], tl.float32),)
    for start in range(begin, stop, STEP):
        key = start + tl.arange(0, STEP)
        key_valid = key < stop
        k_rows = k + key.to(tl.int64) * ks
        key_tiles = ()
        qk = tl.zeros([ROWS, STEP], tl.float32)
        # q . k, summed over chunks of columns. If KEPT, the tiles are also the values of the second product.
        if UNROLLED:
            for i in tl.static_range(KEY_CHUNKS):
                query = _columns(q_rows, row_valid, i * WIDTH, DK, WIDTH, (i + 1) * WIDTH <= DK)
                tile = _columns(k_rows, key_valid, i * WIDTH, DK, WIDTH, (i + 1) * WIDTH <= DK)
                if KEPT:
                    key_tiles = key_tiles + (tile,)
                qk = tl.dot(query, tl.trans(tile), qk, input_precision="ieee")
        else:
            for i in range(KEY_CHUNKS):
                query = _columns(q_rows, row_valid, i * WIDTH, DK, WIDTH, DK % WIDTH == 0)
                tile = _columns(k_rows, key_valid, i * WIDTH, DK, WIDTH, DK % WIDTH == 0)
                qk = tl.dot(query, tl.trans(tile), qk, input_precision="ieee")

        # The other terms of the logit, in the order of terms.py and in units of log2(e).
        if CONSTANT:
            qk += row_constant[:, None]
        if FACTOR:
            at = factor + head[:, None] * fn + key.to(tl.int64)[None, :] * fs
            qk *= tl.load(at, mask=row_valid[:, None] & key_valid[None, :], other=0.0).to(tl.float32)
        if SHIFT:
            qk += row_shift[:, None]
        scores = qk * scale
        if SOFTCAP:
            scores = tanh(scores) * cap
        visible = row_valid[:, None] & key_valid[None, :]
        if ALIBI:
            scores -= slope[:, None] * tl.abs(offset + token[:, None] - key[None, :]).to(tl.float32)
        if BIAS:
            at = bias + (beam * bo + head * bn + token * bt)[:, None] + key.to(tl.int64)[None, :] * bs
            scores += tl.load(at, mask=visible, other=0.0).to(tl.float32) * 1.4426950408889634
        if MASK:
            at = mask + (beam * mo + head * mn + token * mt)[:, None] + key.to(tl.int64)[None, :] * ms
            visible &= tl.load(at, mask=visible, other=0) != 0
        if CAUSAL:
            visible &= key[None, :] <= offset + token[:, None]
        scores = tl.where(visible, scores, float("-inf"))

        # Online softmax: rescale the running sum and output to the new maximum.
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key keeps (0, -inf)
        p = tl.exp2(scores - m_safe[:, None])
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new

        # Add the product with the values, of which this program computes VALUE_CHUNKS chunks of columns.
        weights = p.to(k.dtype.element_ty)
        new_acc = ()
        for i in tl.static_range(VALUE_CHUNKS):
            if KEPT:
                value = key_tiles[i]
            else:
                column = (column_tile * VALUE_CHUNKS + i) * WIDTH
                value = _columns(
                    v + key.to(tl.int64) * vs, key_valid, column, DV, WIDTH, DV % (WIDTH * VALUE_CHUNKS) == 0
                )
            new_acc = new_acc + (tl.dot(weights, value, acc[i] * alpha[:, None], input_precision="ieee"),)
        acc = new_acc

    # Normalise and store; a row that has seen no key in this split stores (0, -inf).
    seen = l_i > 0.0
    inverse_l = tl.where(seen, 1.0 / tl.where(seen, l_i, 1.0), 0.0)
    at_result = (unit * tl.num_programs(1) + split) * rows + row
    for i in tl.static_range(VALUE_CHUNKS):
        column = (column_tile * VALUE_CHUNKS + i) * WIDTH + tl.arange(0, WIDTH)
        tl.store(
            out + at_result[:, None] * DV + column[None, :], acc[i] * inverse_l[:, None],
            mask=row_valid[:, None] & (column < DV)[None, :],
        )  # fmt: skip
    split_lse = tl.where(seen, (m_i + tl.log2(tl.where(seen, l_i, 1.0))) * 0.6931471805599453, float("-inf"))
    if column_tile == 0:  # all column tiles compute the same lse
        tl.store(lse + at_result, split_lse, mask=row_valid)
