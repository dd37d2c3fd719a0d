"""Normalised keys without the keys: a key's norm reduces to one number per key and head.

RMSNorm's k / rms(k) and LayerNorm's (k - mean(k)) / std(k) divide by a scalar that depends on the key alone. Everything
else is linear and moves to the query or into W_k, so a cache of layer inputs needs that scalar beside it and no key:

    norm(k_j) = r_j * centre(W_k h_j + b_k) * gamma + beta      centre: identity (rms), subtract the mean (layer)
    q . norm(k_j) = r_j * ((gamma q) centre(W_k) h_j + (gamma q) . centre(b_k)) + q . beta
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm or LayerNorm over a head's D numbers, as models put on queries and keys."""

    kind: Literal["rms", "layer"] = "rms"
    weight: torch.Tensor | None = None
    """gamma: (D,), or (H, D) with one a head; None is 1."""
    bias: torch.Tensor | None = None
    """beta, as weight; None is 0."""
    eps: float = 1e-6

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The whole norm of x (B, T, H, D)."""
        y = self.centre(x) * self.scale(x)[..., None]
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def centre(self, x: torch.Tensor) -> torch.Tensor:
        """The linear part, over the last dimension."""
        return x if self.kind == "rms" else x - x.mean(-1, keepdim=True)

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        """r: (…) of x (…, D), in fp32 or fp64."""
        wide = x if x.dtype == torch.float64 else x.float()
        return torch.rsqrt(self.centre(wide).square().mean(-1) + self.eps)


def key_scales(
    hidden: torch.Tensor, w_k: torch.Tensor, b_k: torch.Tensor | None, heads: int, norm: Norm
) -> torch.Tensor:
    """r of every key: (B, S, G) fp32 or fp64, to be cached beside the hidden states.

    Args:
        hidden: (B, S, C), the new tokens' layer inputs. w_k: (G * D, C). b_k: (G * D,). heads: G.
    """
    keys = torch.nn.functional.linear(hidden, w_k, b_k)
    return norm.scale(keys.unflatten(-1, (heads, -1)))
