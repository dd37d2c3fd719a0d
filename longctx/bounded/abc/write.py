"""Write a stretch of tokens into ABC's slots without reading them: K = W^T k with W = exp(s - z), z = log sum exp s.

This is what a rank sends to others, and all that non-causal attention needs. Backward recomputes the weights
exp(s_j - z) from the final z, so only the inputs and the state are saved:

    dx = W dK      ds = W (x dK^T - u)      u = dK . K - dz      summed over the states that share the control s
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from longctx.attention.backends.base import accumulator_dtype
from longctx.bounded.chunks import pieces
from longctx.derivative import first_only


def write_slots(
    xs: tuple[torch.Tensor, ...], s: torch.Tensor, *, normalized: bool = True, tokens: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Return what tokens write into M slots under one control.

    Args:
        xs: each (B, G, T, Di); may be empty. s: (B, G, T, M).
        normalized: s are logits and a state is a weighted mean; else s are weights and it is a sum.
        tokens: (B, T) bool, which tokens are written; the others may hold any value, NaN included. None: all.

    Returns:
        (log mass (B, G, M), states (B, G, M, Di)...) in fp32, fp64 for fp64; differentiable.
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
        states = [mass.new_zeros((*mass.shape, x.shape[3])) for x in xs]
        for _, weights, parts in _weighted(s, normalized, tokens, mass, xs):
            for state, part in zip(states, parts, strict=True):
                state += weights.transpose(-1, -2) @ part
        ctx.save_for_backward(s, tokens, mass, *xs, *states)
        ctx.normalized, ctx.count = normalized, len(xs)
        ctx.set_materialize_grads(False)
        return mass, *states

    @staticmethod
    def backward(ctx: Any, dmass: torch.Tensor | None, *given: torch.Tensor | None) -> Any:
        s, tokens, mass, *rest = ctx.saved_tensors
        xs, states = rest[: ctx.count], rest[ctx.count :]
        gradients = [torch.zeros_like(x) if d is None else d for d, x in zip(given, states, strict=True)]
        u = torch.zeros_like(mass) if dmass is None else -dmass
        for d, x in zip(gradients, states, strict=True):
            u = u + (d * x).sum(-1)
        ds, dxs = torch.empty_like(s), [torch.empty_like(x) for x in xs]
        for here, weights, parts in _weighted(s, ctx.normalized, tokens, mass, xs):
            dw = torch.zeros_like(weights)
            for dx, part, d in zip(dxs, parts, gradients, strict=True):
                dx[:, :, here] = (weights @ d).to(dx.dtype)
                dw += part @ d.transpose(-1, -2)
            ds[:, :, here] = (weights * (dw - u[:, :, None]) if ctx.normalized else dw).to(s.dtype)
        return ds, None, None, *dxs


def _weighted(
    s: torch.Tensor, normalized: bool, tokens: torch.Tensor | None, mass: torch.Tensor, xs: Any
) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor]]]:
    """Yield (slice, weights, part of each x) in the accumulator's dtype, with 0 for tokens that are not written."""
    safe = mass.masked_fill(mass == -torch.inf, 0.0)[:, :, None]
    for here, absent in pieces(s.shape[2], tokens):
        weights = s[:, :, here].to(mass.dtype)
        weights = (weights - safe).exp() if normalized else weights
        parts = [x[:, :, here].to(mass.dtype) for x in xs]
        if absent is not None:
            weights, *parts = (x.masked_fill(absent, 0.0) for x in (weights, *parts))
        yield here, weights, parts
