"""The state that a whole stretch of tokens leaves in cosine attention, S = sum_j N(k_j) (size_j v_j)^T.

What a rank tells the others, and all that attention which is not causal needs. Nothing but the inputs is kept.
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.attention.backends.base import accumulator_dtype
from longctx.bounded.cosine.chunks import through_unit, unit
from longctx.derivative import first_only

_TOKENS = 2048
"""Tokens that are normalised at one time."""


def memory_of(k: torch.Tensor, v: torch.Tensor, size: torch.Tensor | None, tokens: torch.Tensor | None) -> torch.Tensor:
    """(B, G, D, Dv) in fp32, fp64 for fp64; differentiable.

    Args:
        k (B, G, T, D), v (B, G, T, Dv); size (B, G, T) multiplies the values, None is 1.
        tokens: (B, T) bool, which of them count; the others leave nothing, whatever they hold. None: all.
    """
    return _Write.apply(k, v, size, tokens)


@first_only
class _Write(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: torch.Tensor, v: torch.Tensor, size: torch.Tensor | None, tokens: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(k, v, size, tokens)
        dtype = accumulator_dtype(k.dtype)
        state = torch.zeros((*k.shape[:2], k.shape[3], v.shape[3]), dtype=dtype, device=k.device)
        for _, unit_k, _, part, factor in _pieces(k, v, size, tokens):
            state += unit_k.transpose(-1, -2) @ (part if factor is None else part * factor)
        return state

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        k, v, size, tokens = ctx.saved_tensors
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        dsize = None if size is None else torch.empty_like(size)
        for here, unit_k, norm, part, factor in _pieces(k, v, size, tokens):
            dvalue = unit_k @ gradient
            scaled = part if factor is None else part * factor
            dk[:, :, here] = through_unit(scaled @ gradient.transpose(-1, -2), unit_k, norm).to(k.dtype)
            if dsize is not None:
                dsize[:, :, here] = (dvalue * part).sum(-1).to(dsize.dtype)
            dv[:, :, here] = (dvalue if factor is None else dvalue * factor).to(v.dtype)
        return dk, dv, dsize, None


def _pieces(k: torch.Tensor, v: torch.Tensor, size: torch.Tensor | None, tokens: torch.Tensor | None) -> Any:
    """(where, unit keys, their norms, values, size) some tokens at a time, in the accumulator's dtype."""
    dtype = accumulator_dtype(k.dtype)
    for first in range(0, k.shape[2], _TOKENS):
        here = slice(first, first + _TOKENS)
        keys, values = (x[:, :, here].to(dtype) for x in (k, v))
        if tokens is not None:
            absent = ~tokens[:, None, here, None]
            keys, values = keys.masked_fill(absent, 0.0), values.masked_fill(absent, 0.0)
        yield here, *unit(keys), values, None if size is None else size[:, :, here, None].to(dtype)
