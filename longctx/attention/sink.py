"""An attention sink: one learned logit a head that takes its share of every softmax and gives nothing.

It is a key with no value, seen by every query, so no backend has to know it: the running state of a query begins as if
it had met that key, (out, lse) = (0, sink) instead of (0, -inf), and the final lse holds it. Its gradient needs the
final lse only.
"""

from __future__ import annotations

import torch

from longctx.attention.backends.base import Rows, accumulator_dtype, delta_of


def begin(q: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """(out (B, H, Tq, Dv), lse (B, H, Tq), first) before any key; `first`: they hold nothing yet, not even zeros."""
    lse = torch.empty(q.shape[:3], dtype=accumulator_dtype(q.dtype), device=q.device)
    out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=lse.dtype, device=q.device)
    if sink is None:
        return out, lse, True
    lse.copy_(sink[:, None].expand(lse.shape))
    return out.zero_(), lse, False


def gradient(rows: Rows, sink: torch.Tensor) -> torch.Tensor:
    """(H,) in the accumulator's dtype: this rank's queries' part of the sink's gradient.

    The sink's probability is exp(sink - lse) and its value 0, so dS = P * (0 - delta), summed over rows. A row that
    sees nothing has lse -inf beside a sink of -inf, and gives it nothing.
    """
    logits = sink[:, None].to(rows.lse.dtype)
    share = torch.exp(logits - rows.lse.masked_fill(rows.lse == -torch.inf, torch.inf))
    return -(share * delta_of(rows)).sum((0, 2))
