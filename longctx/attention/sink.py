"""Attention sink: one learned logit per head that joins the softmax denominator but has no value.

It acts as a key with value 0 that every query sees. Backends need not know it: a query's running result starts as
(out, lse) = (0, sink) instead of (0, -inf), so the final lse includes it, and its gradient needs that lse only.
"""

from __future__ import annotations

import torch

from longctx.attention.backends.base import BackwardQueries, accumulator_dtype, delta_of


def begin(q: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return (out (B, H, Tq, Dv), lse (B, H, Tq), first) before any key; first: both are uninitialised."""
    lse = torch.empty(q.shape[:3], dtype=accumulator_dtype(q.dtype), device=q.device)
    out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=lse.dtype, device=q.device)
    if sink is None:
        return out, lse, True
    lse.copy_(sink[:, None].expand(lse.shape))
    return out.zero_(), lse, False


def gradient(queries: BackwardQueries, sink: torch.Tensor) -> torch.Tensor:
    """Return this rank's queries' part of the sink's gradient, (H,) in the accumulator's dtype.

    The sink's probability is P = exp(sink - lse) and its value 0, so dS = P * (0 - delta), summed over queries. A query
    with lse -inf (it sees no key, and the sink is -inf) contributes 0.
    """
    logits = sink[:, None].to(queries.lse.dtype)
    p = torch.exp(logits - queries.lse.masked_fill(queries.lse == -torch.inf, torch.inf))
    return -(p * delta_of(queries)).sum((0, 2))
