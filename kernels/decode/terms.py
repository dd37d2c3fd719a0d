"""What joins the product of a query and a key on its way to a logit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Optional = torch.Tensor | None


@dataclass(frozen=True)
class Terms:
    """What a logit is made of: cap(((q . k + constant) * factor + shift) * scale) - slope * |i - j| + bias where
    the mask is true, else -inf. Query t stands at offset + t, key j at j.

    constant, shift (B, G, rows) fp32, dense; factor (B, G, N, S) floating; slopes (G, N) fp32, dense; bias floating and
    mask bool, both (B, G, beams, N, T, S) of any strides; lengths (B,) int32: keys from there on are hidden.
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
        """Something joins the logits, or hides keys."""
        joining = self.softcap, self.constant, self.factor, self.shift, self.slopes, self.bias
        return self.causal or any(x is not None for x in (*joining, self.mask, self.lengths))
