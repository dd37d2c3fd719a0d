"""Log masses, z_t = log sum_{j <= t} exp(s_j) of a slot within its document: the log denominator of every weight.

First each chunk is summed on its own, then a short scan over chunks gives the mass at every boundary, then a second
pass over each chunk starts from its boundary.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add(a, b):
    """Return log(exp(a) + exp(b)), also where one or both are -inf."""
    top = tl.maximum(a, b)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.exp(a - base) + tl.exp(b - base)  # at least 1, unless both are -inf
    return tl.where(top == float("-inf"), top, base + tl.log(tl.maximum(total, 1.0)))


@triton.jit
def masses_kernel(
    s, ids, edges, boundary, z, sb, sh, st, head_count, length, chunks,
    CHUNK: tl.constexpr, SLOTS: tl.constexpr, WM: tl.constexpr, DOCUMENTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, B * G). Without ROWS: write the log mass that the chunk adds to its last document into boundary (B,
    G, chunks + 1, M) at chunk + 1. With ROWS: write z (B, G, T, M) of every row, starting from boundary at chunk;
    padding repeats the row before it."""
    chunk = tl.program_id(0)
    batch = (tl.program_id(1) // head_count).to(tl.int64)
    head = (tl.program_id(1) % head_count).to(tl.int64)
    slot = tl.arange(0, WM)
    inside = slot < SLOTS
    begin = (chunk * CHUNK).to(tl.int64)
    boundary += (tl.program_id(1).to(tl.int64) * (chunks + 1) + chunk) * SLOTS + slot
    z += (tl.program_id(1).to(tl.int64) * length + begin) * SLOTS + slot
    s += batch * sb + head * sh + begin * st + slot
    mass = tl.full([WM], float("-inf"), tl.float32)
    if ROWS:
        mass = tl.load(boundary, mask=inside, other=float("-inf"))
    document = begin * 0
    if DOCUMENTS:
        document = tl.load(edges + batch * (chunks + 1) + chunk)
    for i in range(0, tl.minimum(CHUNK, length - chunk * CHUNK)):
        logit = tl.load(s + i * st, mask=inside, other=float("-inf")).to(tl.float32)
        if DOCUMENTS:
            own = tl.load(ids + batch * length + begin + i)
            mass = tl.where((own >= 0) & (own != document), float("-inf"), mass)
            document = tl.where(own >= 0, own, document)
            logit = tl.where(own >= 0, logit, float("-inf"))
        mass = add(mass, logit)
        if ROWS:
            tl.store(z + i * SLOTS, mass, mask=inside)
    if not ROWS:
        tl.store(boundary + SLOTS, mass, mask=inside)


@triton.jit
def walk_kernel(
    boundary, start, edges, head_count, chunks, SLOTS: tl.constexpr, WM: tl.constexpr, DOCUMENTS: tl.constexpr
):  # fmt: skip
    """Grid (B * G,). In place, turn what each chunk adds into the log mass at each boundary (B, G, chunks + 1, M);
    start (B, G, M) is the mass at the first."""
    batch = (tl.program_id(0) // head_count).to(tl.int64)
    slot = tl.arange(0, WM)
    inside = slot < SLOTS
    boundary += tl.program_id(0).to(tl.int64) * (chunks + 1) * SLOTS + slot
    mass = tl.load(start + tl.program_id(0).to(tl.int64) * SLOTS + slot, mask=inside, other=float("-inf"))
    tl.store(boundary, mass, mask=inside)
    for i in range(chunks):
        if DOCUMENTS:  # a new document starts from an empty state
            edge = edges + batch * (chunks + 1) + i
            mass = tl.where(tl.load(edge) == tl.load(edge + 1), mass, float("-inf"))
        added = tl.load(boundary + (i + 1) * SLOTS, mask=inside, other=float("-inf"))
        mass = add(mass, added)
        tl.store(boundary + (i + 1) * SLOTS, mass, mask=inside)
