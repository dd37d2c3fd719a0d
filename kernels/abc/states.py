"""What each chunk adds to ABC's state, and what its queries add to the gradient of the state before it."""

from __future__ import annotations

import triton
import triton.language as tl

from ..cosine.numbers import narrow
from ..flash.elements import load_rows
from .pairs import fade, load_slots


@triton.jit
def write_kernel(
    s, y, x, z, boundary, ids, edges, states, sb, sh, st, xb, xh, xt, state_heads, group, length, chunks,
    CHUNK: tl.constexpr, SLOTS: tl.constexpr, WM: tl.constexpr, DX: tl.constexpr, WX: tl.constexpr,
    AFTER: tl.constexpr, DOCUMENTS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Compute sum_j w_jm x_j, (M, DX), over the tokens of a chunk and the `group` heads that share the state.

    Grid (chunks, B * G). AFTER: w = exp(s_j - z at the chunk's end), x (B, G, T, DX), written to states (B, G, chunks +
    1, M, DX) at chunk + 1. Else w = exp(z at the chunk's start - z_t) y_t, y (B, H, T, M) fp32, x (B, H, T, DX),
    written at chunk. boundary (B, G, chunks + 1, M): z at both ends.
    """
    chunk = tl.program_id(0)
    batch = (tl.program_id(1) // state_heads).to(tl.int64)
    state_head = tl.program_id(1) % state_heads
    begin = (chunk * CHUNK).to(tl.int64)
    row = tl.arange(0, CHUNK)
    part = begin + row < length
    if DOCUMENTS:
        own = tl.load(ids + batch * length + begin + row, mask=part, other=-1)
        part = (own >= 0) & (own == tl.load(edges + batch * (chunks + 1) + chunk + AFTER))
    slot = tl.arange(0, WM)
    at_slot = (tl.program_id(1).to(tl.int64) * (chunks + 1) + chunk + AFTER) * SLOTS
    edge = tl.load(boundary + at_slot + slot, mask=slot < SLOTS, other=float("-inf"))
    if AFTER:
        s_rows = s + batch * sb + state_head.to(tl.int64) * sh + begin * st
        weight = fade(load_slots(s_rows, st, row, part, SLOTS, WM), edge[None, :])
    else:
        z_rows = z + (tl.program_id(1).to(tl.int64) * length + begin) * SLOTS
        weight = tl.where(part[:, None], fade(edge[None, :], load_slots(z_rows, SLOTS, row, part, SLOTS, WM)), 0.0)
    total = tl.zeros([WM, WX], tl.float32)
    for i in range(group):
        head = (state_head * group + i).to(tl.int64)
        left = weight
        if not AFTER:
            rows = y + ((batch * state_heads * group + head) * length + begin) * SLOTS
            left = weight * load_rows(rows, SLOTS, part, CHUNK, SLOTS, WM, True)
        right = load_rows(x + batch * xb + head * xh + begin * xt, xt, part, CHUNK, DX, WX, True)
        scaled, top = narrow(left, TYPE)
        total += tl.dot(tl.trans(scaled), right.to(TYPE), input_precision="ieee") * top
    column = tl.arange(0, WX)
    mask = (slot < SLOTS)[:, None] & (column < DX)[None, :]
    tl.store(states + (at_slot + slot)[:, None] * DX + column[None, :], total, mask=mask)
