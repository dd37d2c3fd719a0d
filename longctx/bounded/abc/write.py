"""The memory that a stretch of tokens writes, without reading it: K = W^T k with W = exp(s - z), z = log sum exp s.

What a rank tells the others, and all that attention which is not causal needs. Backward weights are the final ones,
exp(s_j - z) again, so nothing but the inputs and the memory is kept:

    dx = W dK      ds = W (x dK^T - u)      u = dK . K - dz      summed over the memories that share the control s
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from longctx.attention.backends.base import accumulator_dtype
from longctx.derivative import first_only

_TOKENS = 2048
"""Tokens whose weights exist at one time."""


def memory_of(
    xs: tuple[torch.Tensor, ...], s: torch.Tensor, *, normalized: bool = True, tokens: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """What tokens leave in M slots under one control.

    Args:
        xs: each (B, G, T, Di); none is allowed. s: (B, G, T, M).
        normalized: s are logits, and a memory is a mean; else s are weights, and it is a sum.
        tokens: (B, T) bool, which of them count; the others leave nothing, whatever they hold. None: all.

    Returns:
        (log mass (B, G, M), memories (B, G, M, Di)...) in fp32, fp64 for fp64; differentiable.
    """
    return _Write.apply(s, normalized, tokens, *xs)


@first_only
class _Write(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, s: torch.Tensor, normalized: bool, tokens: torch.Tensor | None, *xs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        logits = s.to(accumulator_dtype(s.dtype))
        logits = logits if normalized else logits.abs().log()
        if tokens is not None:
            logits = logits.masked_fill(~tokens[:, None, :, None], -torch.inf)
        mass = torch.logsumexp(logits, 2)
        memories = [mass.new_zeros((*mass.shape, x.shape[3])) for x in xs]
        for _, weights, parts in _pieces(s, normalized, tokens, mass, xs):
            for memory, part in zip(memories, parts, strict=True):
                memory += weights.transpose(-1, -2) @ part
        ctx.save_for_backward(s, tokens, mass, *xs, *memories)
        ctx.normalized, ctx.count = normalized, len(xs)
        ctx.set_materialize_grads(False)
        return mass, *memories

    @staticmethod
    def backward(ctx: Any, dmass: torch.Tensor | None, *given: torch.Tensor | None) -> Any:
        s, tokens, mass, *rest = ctx.saved_tensors
        xs, memories = rest[: ctx.count], rest[ctx.count :]
        gradients = [torch.zeros_like(x) if d is None else d for d, x in zip(given, memories, strict=True)]
        fall = torch.zeros_like(mass) if dmass is None else -dmass
        for d, x in zip(gradients, memories, strict=True):
            fall = fall + (d * x).sum(-1)
        ds, dxs = torch.empty_like(s), [torch.empty_like(x) for x in xs]
        for here, weights, parts in _pieces(s, ctx.normalized, tokens, mass, xs):
            gain = torch.zeros_like(weights)
            for dx, part, d in zip(dxs, parts, gradients, strict=True):
                dx[:, :, here] = (weights @ d).to(dx.dtype)
                gain += part @ d.transpose(-1, -2)
            ds[:, :, here] = (weights * (gain - fall[:, :, None]) if ctx.normalized else gain).to(s.dtype)
        return ds, None, None, *dxs


def _pieces(
    s: torch.Tensor, normalized: bool, tokens: torch.Tensor | None, mass: torch.Tensor, xs: Any
) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor]]]:
    """(where, the weights, the tokens of each x), some tokens at a time, in the accumulator's dtype."""
    safe = mass.masked_fill(mass == -torch.inf, 0.0)[:, :, None]
    for first in range(0, s.shape[2], _TOKENS):
        here = slice(first, first + _TOKENS)
        weights = s[:, :, here].to(mass.dtype)
        weights = (weights - safe).exp() if normalized else weights
        parts = [x[:, :, here].to(mass.dtype) for x in xs]
        if tokens is not None:
            absent = ~tokens[:, None, here, None]
            weights, *parts = (x.masked_fill(absent, 0.0) for x in (weights, *parts))
        yield here, weights, parts
