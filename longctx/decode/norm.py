"""Norms of keys that are never computed: a cache of hidden states needs one more number per key and head.

RMSNorm's k / rms(k) and LayerNorm's (k - mean(k)) / std(k) divide by a scalar that depends only on the key. The rest is
linear and is folded into the query and W_k; the scalar is cached (docs/methods/el.md "Normalised keys"):

    norm(k_j) = r_j * centre(W_k h_j + b_k) * gamma + beta      centre: identity (rms), subtract the mean (layer)
    q . norm(k_j) = r_j * ((gamma q) . centre(W_k) h_j + (gamma q) . centre(b_k)) + q . beta
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm or LayerNorm over each head's D elements, as models apply it to queries and keys."""

    kind: Literal["rms", "layer"] = "rms"
    weight: torch.Tensor | None = None
    """gamma: (D,), or (H, D) with one vector per head; None is 1."""
    bias: torch.Tensor | None = None
    """beta, shaped like weight; None is 0."""
    eps: float = 1e-6

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x (B, T, H, D)."""
        y = self.centre(x) * self.scale(x)[..., None]
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def centre(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the norm's linear part, over the last dimension."""
        return x if self.kind == "rms" else x - x.mean(-1, keepdim=True)

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        """Return r (…) of x (…, D), in fp32 or fp64."""
        wide = x if x.dtype == torch.float64 else x.float()
        return torch.rsqrt(self.centre(wide).square().mean(-1) + self.eps)


def key_scales(
    hidden: torch.Tensor, w_k: torch.Tensor, b_k: torch.Tensor | None, heads: int, norm: Norm
) -> torch.Tensor:
    """Return r of every key, (B, S, G) fp32 or fp64, to be cached beside the hidden states.

    Args:
        hidden: (B, S, C), the layer inputs of new tokens. w_k: (G * D, C). b_k: (G * D,). heads: G.
    """
    keys = torch.nn.functional.linear(hidden, w_k, b_k)
    return norm.scale(keys.unflatten(-1, (heads, -1)))
