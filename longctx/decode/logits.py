"""Everything that joins a logit besides the product of an expanded query and a hidden state, tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from longctx.decode.norm import Norm, key_scales

Bias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Logits:
    """(B, beams * H, T, n) products of keys start..stop -> logits, in the order in which a model makes them.

    s = cap((q' . h + constant) * scale_of_key + shift + rotary) + bias(i, j) + mask
    """

    beams: int
    heads: int
    positions: torch.Tensor
    """(T,) of the queries."""
    constant: torch.Tensor | None = None
    """(B * beams, H, T): the query with the key bias."""
    scales: torch.Tensor | None = None
    """(B, S, G): what a norm divides each key by, inverted."""
    shift: torch.Tensor | None = None
    """(B * beams, H, T): the query with the norm's bias."""
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    """q (B * beams, H, T, R) and k (B, S, R), where they could not join the product."""
    softcap: float | None = None
    bias: Bias | None = None
    mask: torch.Tensor | None = None
    causal: bool = False
    places: torch.Tensor | None = None
    """(S,) positions of the keys; None: 0, 1, 2, …"""

    def keys(self, start: int, stop: int) -> torch.Tensor:
        """Positions of keys start..stop, (n,) int64."""
        if self.places is None:
            return torch.arange(start, stop, device=self.positions.device)
        return self.places[start:stop]

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
            turned = self.rotary[1][:, start:stop].repeat_interleave(self.beams, 0).to(dtype)
            logits = logits + self.rotary[0].to(dtype) @ turned[:, None].mT
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
    """Queries made to meet hidden states, and what the folding leaves over."""

    queries: torch.Tensor
    """(B * beams, H, T, C)."""
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
        competing: something beside the keys is in the softmax, or bends the logits: what is the same for all keys of
            a query then matters. Without it the softmax does not see such terms, and they are dropped.
    """
    heads, groups = q.shape[1], w_k.shape[0] // q.shape[3]
    weights, bias = w_k.unflatten(0, (groups, -1)), None if b_k is None else b_k.unflatten(0, (groups, -1))
    shift = _dot(q, norm.bias) if competing and norm is not None and norm.bias is not None else None
    if norm is not None:
        q = q if norm.weight is None else q * rows_of(norm.weight, heads)[:, None]
        weights = norm.centre(weights.mT).mT
        bias = None if bias is None else norm.centre(bias)
        scales = key_scales(hidden, w_k, b_k, groups, norm) if scales is None else scales
    seen = bias is not None and (competing or norm is not None)
    queries = torch.einsum("bgntd,gdc->bgntc", q.unflatten(1, (groups, -1)), weights).flatten(1, 2)
    return Expansion(queries, _dot(q, bias) if seen and bias is not None else None, shift, scales)


def rows_of(per_head: torch.Tensor, heads: int) -> torch.Tensor:
    """(D,), (G, D) or (H, D) -> (1 or H, D): a row for each query head."""
    if per_head.dim() == 1:
        return per_head[None]
    return per_head.repeat_interleave(heads // per_head.shape[0], 0)


def _dot(q: torch.Tensor, per_head: torch.Tensor) -> torch.Tensor:
    """(B, H, T): every query with its head's vector."""
    return torch.einsum("bhtd,hd->bht", q, rows_of(per_head, q.shape[1]).expand(q.shape[1], -1))
