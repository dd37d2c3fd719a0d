"""Cross entropy, one program per token: the loss of its row of logits, and the row overwritten with its gradient.

The row is read twice and written once in its own dtype, and computed in fp32. Every lane keeps its own maximum and sum
until the end of the row, so that no step needs a reduction across lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..flash.elements import tanh

LOWEST = tl.constexpr(
    -2e38
)  # the maximum of a lane that has seen nothing, or only -inf; finite in fp32 also times log2(e)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def bend(x, softcap, CAPPED: tl.constexpr):
    """Return (the capped logit, tanh(x / softcap)) if CAPPED, else (x, x)."""
    bent = x
    slope = x
    if CAPPED:
        slope = tanh(x / softcap)
        bent = softcap * slope
    return bent, slope


@triton.jit
def row_kernel(
    logits, labels, loss, stride, vocabulary, ignore_index, z_loss, softcap,
    WIDTH: tl.constexpr, CAPPED: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Grid (n,). logits (n, V), rows dense and `stride` apart; labels (n,) int64, dense; loss (n,) fp32. GRADIENT:
    overwrite the logits with it. A label beyond the vocabulary yields NaN."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    counts = label != ignore_index
    at = logits + row * stride
    lane = tl.arange(0, WIDTH)
    there = (label >= 0) & (label < vocabulary)
    own = tl.load(at + label, mask=there, other=float("nan")).to(tl.float32)
    own, own_slope = bend(own, softcap, CAPPED)
    # Online softmax in each lane: when its maximum rises, rescale its sum.
    highest = tl.full([WIDTH], LOWEST, tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(0, vocabulary, WIDTH):
        inside = first + lane < vocabulary
        x = tl.load(at + first + lane, mask=inside, other=0.0).to(tl.float32)
        x, slope = bend(x, softcap, CAPPED)
        x = tl.where(inside, x, float("-inf"))
        higher = tl.maximum(highest, x)
        total = total * tl.exp2((highest - higher) * LOG2E) + tl.exp2((x - higher) * LOG2E)
        highest = higher
    top = tl.max(highest, 0)
    denominator = tl.sum(total * tl.exp2((highest - top) * LOG2E), 0)
    lse = top + tl.log(denominator)
    tl.store(loss + row, tl.where(counts, lse - own + z_loss * lse * lse, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # all threads read the label's logit before any overwrites it
        scale = tl.where(counts, (1.0 + 2.0 * z_loss * lse) / denominator, 0.0)
        for first in range(0, vocabulary, WIDTH):
            inside = first + lane < vocabulary
            x = tl.load(at + first + lane, mask=inside, other=0.0).to(tl.float32)
            x, slope = bend(x, softcap, CAPPED)
            gradient = tl.exp2((x - top) * LOG2E) * scale
            gradient = tl.where(counts & (first + lane == label), gradient - 1.0, gradient)
            if CAPPED:
                gradient *= 1.0 - slope * slope
            tl.store(at + first + lane, gradient, mask=inside)
