"""The terms of a decoding logit beside q.k."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Optional = torch.Tensor | None


@dataclass(frozen=True)
class Terms:
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
        """Whether any term beside scale * q.k is used, or any key hidden."""
        joining = self.softcap, self.constant, self.factor, self.shift, self.slopes, self.bias
        return self.causal or any(x is not None for x in (*joining, self.mask, self.lengths))
