"""What one decode call computes: `Operands`, the tensors and sizes of its products, and `Terms` of its logits.

`longctx/decode/kernel.py` derives the operator's schema from these fields, in their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

Optional = torch.Tensor | None


class Operands(NamedTuple):
    """Queries and the keys and values that they share.

    q (B, G, rows, Dk): rows are (beams, N, T) flattened, with N = `heads` query heads per key head and T = `tokens` new
    tokens. k (B, G, S, Dk). v (B, G, S, Dv), Dv = `value_width`; None: the values are the first Dv columns of k.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: Optional
    value_width: int
    heads: int
    tokens: int


class Terms(NamedTuple):
    """The logit cap(((q . k + constant) * factor + shift) * scale) - slope * |i - j| + bias if the mask is true, else
    -inf. New token t has position i = offset + t, key j position j.

    constant, shift (B, G, rows) fp32, dense; factor (B, G, N, S) floating; slopes (G, N) fp32, dense; bias floating and
    mask bool, both (B, G, beams, N, T, S) of any strides; lengths (B,) int32: keys from this index on are hidden.
    """

    scale: float
    softcap: float | None = None
    constant: Optional = None
    factor: Optional = None
    shift: Optional = None
    slopes: Optional = None
    bias: Optional = None
    mask: Optional = None
    lengths: Optional = None
    causal: bool = False
    offset: int = 0

    @property
    def extras(self) -> bool:
        """Whether any term other than scale * q.k is used, or any key hidden."""
        tensors = self.constant, self.factor, self.shift, self.slopes, self.bias, self.mask, self.lengths
        return self.causal or self.softcap is not None or any(x is not None for x in tensors)
