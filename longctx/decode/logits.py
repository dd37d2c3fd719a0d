"""EL's logits, tile by tile: the expanded query and all terms besides its product with hidden states.

Equations: docs/methods/el.md "Biases and other terms" and "Normalised keys".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from longctx.decode.norm import Norm, key_scales

Bias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(query positions (T,), key positions (n,)) -> (H, T, n) or (T, n), added to the logits."""


@dataclass(frozen=True, eq=False)
class Logits:
    """Map products q' . h (B, beams * H, T, n) with keys start..stop to logits, in the order in which models add terms:

    s = cap((q' . h_j + constant) * r_j + shift + rotary) + bias(i, j) + mask
    """

    beams: int
    heads: int
    positions: torch.Tensor
    """(T,) of the queries."""
    constant: torch.Tensor | None = None
    """(B * beams, H, T): q . b_k."""
    scales: torch.Tensor | None = None
    """(B, S, G): r_j, the reciprocal of what the norm divides key j by."""
    shift: torch.Tensor | None = None
    """(B * beams, H, T): q . beta, beta the bias of the keys' norm."""
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    """q_r (B * beams, H, T, R) and k_r (B, S, R), if r_j keeps them from being columns of q' and h."""
    softcap: float | None = None
    bias: Bias | None = None
    mask: torch.Tensor | None = None
    causal: bool = False
    key_positions: torch.Tensor | None = None
    """(S,); None: 0, 1, 2, …"""

    def keys(self, start: int, stop: int) -> torch.Tensor:
        """Return the positions of keys start..stop, (n,) int64."""
        if self.key_positions is None:
            return torch.arange(start, stop, device=self.positions.device)
        return self.key_positions[start:stop]

    def __call__(self, products: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the logits, -inf where hidden."""
        dtype, keys = products.dtype, self.keys(start, stop)
        logits = products.view(-1, self.heads, *products.shape[2:])
        if self.constant is not None:
            logits = logits + self.constant.to(dtype)[..., None]
        if self.scales is not None:
            per_head = self.scales[:, start:stop].repeat_interleave(self.heads // self.scales.shape[2], 2)
            logits = logits * per_head.repeat_interleave(self.beams, 0).transpose(1, 2)[:, :, None].to(dtype)
        if self.shift is not None:
            logits = logits + self.shift.to(dtype)[..., None]
        if self.rotary is not None:
            k_r = self.rotary[1][:, start:stop].repeat_interleave(self.beams, 0).to(dtype)
            logits = logits + self.rotary[0].to(dtype) @ k_r[:, None].mT
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.bias is not None:
            logits = logits + self.bias(self.positions, keys).to(dtype)
        if self.mask is not None:
            part = self.mask[..., start:stop]
            logits = logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part.to(dtype)
        if self.causal:
            logits = logits.masked_fill(keys > self.positions[:, None], -torch.inf)
        return logits.view(products.shape)


@dataclass(frozen=True, eq=False)
class Expansion:
    """Queries with W_k folded in, and the terms of the logits that cannot be: see `Logits`."""

    queries: torch.Tensor
    """q' (B * beams, H, T, C)."""
    constant: torch.Tensor | None
    shift: torch.Tensor | None
    scales: torch.Tensor | None


def expand(
    q: torch.Tensor,
    hidden: torch.Tensor,
    w_k: torch.Tensor,
    b_k: torch.Tensor | None,
    norm: Norm | None,
    scales: torch.Tensor | None,
    competing: bool,
) -> Expansion:
    """Fold W_k (G * D, C), its bias and the keys' norm into scaled queries (B * beams, H, T, D).

    Args:
        scales: r_j as cached; None computes it from hidden.
        competing: there is a sink or a softcap. Without either the softmax cancels terms that are the same for all
            keys of a query (q . beta, and q . b_k without a norm), and they are dropped.
    """
    heads, groups = q.shape[1], w_k.shape[0] // q.shape[3]
    weights, bias = w_k.unflatten(0, (groups, -1)), None if b_k is None else b_k.unflatten(0, (groups, -1))
    shift = _dot(q, norm.bias) if competing and norm is not None and norm.bias is not None else None
    # With a norm, q . norm(k_j) = r_j ((gamma q) . centre(W_k) h_j + (gamma q) . centre(b_k)) + q . beta.
    if norm is not None:
        q = q if norm.weight is None else q * rows_of(norm.weight, heads)[:, None]
        weights = norm.centre(weights.mT).mT
        bias = None if bias is None else norm.centre(bias)
        scales = key_scales(hidden, w_k, b_k, groups, norm) if scales is None else scales
    needed = competing or norm is not None  # r_j makes q . b_k differ between the keys of a query
    queries = torch.einsum("bgntd,gdc->bgntc", q.unflatten(1, (groups, -1)), weights).flatten(1, 2)
    return Expansion(queries, _dot(q, bias) if needed and bias is not None else None, shift, scales)


def rows_of(per_head: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat (G, D) for the query heads of each group: (D,), (G, D) or (H, D) -> (1 or H, D)."""
    if per_head.dim() == 1:
        return per_head[None]
    return per_head.repeat_interleave(heads // per_head.shape[0], 0)


def _dot(q: torch.Tensor, per_head: torch.Tensor) -> torch.Tensor:
    """Return the dot product of every query with its head's vector, (B, H, T)."""
    return torch.einsum("bhtd,hd->bht", q, rows_of(per_head, q.shape[1]).expand(q.shape[1], -1))
