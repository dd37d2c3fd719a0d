"""Convert fp32 tiles for a matrix product in half precision."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """Return (x in TYPE, the factor by which to multiply the product). Sums over a sequence and gradients exceed fp16's
    range (6e-5 to 65504), so for fp16 a tile is divided by its largest absolute value."""
    if TYPE == tl.float16:
        top = tl.max(tl.abs(x))
        top = tl.where(top > 0.0, top, 1.0)
        found = (x / top).to(TYPE)
    else:
        top = 1.0
        found = x.to(TYPE)
    return found, top
