"""A linear that does not save its input where backward can recompute it, and the weight gradient of tiled linears."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from longctx.derivative import first_only
from longctx.nn.saved import find_source, saving_source

_ROWS = 4096  # rows of a sum added to at a time where its dtype differs from the factors'


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear; where x (..., D) has a source (`saved.py`), backward gets it from there instead of saving it.

    Args:
        weight: (E, D).
        bias: (E) or None.

    Returns:
        (..., E); gradients are F.linear's.
    """
    source = find_source(x)
    if source is None:
        return F.linear(x, weight, bias)
    with saving_source(source):
        out: torch.Tensor = _Linear.apply(x, weight, bias)
    return out


@first_only
class _Linear(torch.autograd.Function):
    """(x, weight, bias) -> x weightᵀ + bias. Backward reads the weight again: ZeRO-3 replaces its values meanwhile."""

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


def add_product(total: torch.Tensor, dout: torch.Tensor, x: torch.Tensor) -> None:
    """Accumulate total (V, D) += dout (n, V)ᵀ x (n, D), without a second whole matrix where total's dtype is wider."""
    if total.dtype == x.dtype:
        total.addmm_(dout.T, x)
        return
    for rows, columns in zip(total.split(_ROWS), dout.split(_ROWS, 1), strict=True):
        rows += columns.T @ x
