"""Numbers of fp32 on their way into a product of half precision."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """(x in TYPE, what the product has to be multiplied by). fp16 knows no number above 65504 and few below 6e-5, and
    sums over a sequence and gradients have both: such a tile is divided by its largest number."""
    if TYPE == tl.float16:
        top = tl.max(tl.abs(x))
        top = tl.where(top > 0.0, top, 1.0)
        found = (x / top).to(TYPE)
    else:
        top = 1.0
        found = x.to(TYPE)
    return found, top
