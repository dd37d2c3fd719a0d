"""A linear that does not keep its input where backward can have it made anew."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from longctx.derivative import first_only
from longctx.nn.kept import not_kept, source_of


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear; backward asks whoever has x (..., D) for it, if somebody does (`kept.py`).

    Args:
        weight: (E, D).
        bias: (E) or None.

    Returns:
        (..., E); gradients are F.linear's.
    """
    source = source_of(x)
    if source is None:
        return F.linear(x, weight, bias)
    with not_kept(source):
        out: torch.Tensor = _Linear.apply(x, weight, bias)
    return out


@first_only
class _Linear(torch.autograd.Function):
    """(x, weight, bias) -> x weightᵀ + bias. The weight is asked for its values in backward: ZeRO-3 changes them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        if weight.requires_grad:
            ctx.save_for_backward(x)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_x, of_weight, of_bias = ctx.needs_input_grad
        flat = dout.reshape(-1, dout.shape[-1])
        dx = dweight = dbias = None
        if of_x:
            dx = (flat @ ctx.weight).view(*dout.shape[:-1], -1)
        if of_weight:
            (x,) = ctx.saved_tensors
            dweight = flat.T @ x.reshape(-1, x.shape[-1])
        if of_bias:
            dbias = flat.sum(0)
        return dx, dweight, dbias
