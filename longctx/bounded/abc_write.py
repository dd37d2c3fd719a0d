"""The memory that a whole stretch of tokens writes, without reading it: K = W^T k with W = exp(s - z), z = log sum exp s.

What a rank tells the others, and all that attention which is not causal needs. Backward weights are the final ones,
exp(s_j - z) again, so nothing but the inputs and the memory is kept:

    dk = W dK      dv = W dV      ds = W (k dK^T + v dV^T - u)      u = dK . K + dV . V - dz
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from longctx.attention.backends.base import accumulator_dtype

_TOKENS = 2048
"""Tokens whose weights exist at one time."""


def memory_of(x: torch.Tensor, s: torch.Tensor, normalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(memory (B, G, M, D), log mass (B, G, M)) that x (B, G, T, D) leaves under the control s (B, G, T, M).

    Args:
        normalized: s are logits, and the memory a mean; else s are weights, and it is a sum. A token with s of -inf, or
            0, leaves nothing, whatever it holds.
    """
    return _Write.apply(x, s, normalized)


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, s: torch.Tensor, normalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = accumulator_dtype(x.dtype)
        mass = torch.logsumexp(s.to(dtype) if normalized else s.to(dtype).abs().log(), 2)
        memory = torch.zeros((*mass.shape, x.shape[3]), dtype=dtype, device=x.device)
        for _, part, weights in _parts(x, s, mass, normalized):
            memory += weights.transpose(-1, -2) @ part
        ctx.save_for_backward(x, s, mass, memory)
        ctx.normalized = normalized
        ctx.set_materialize_grads(False)
        return memory, mass

    @staticmethod
    def backward(ctx: Any, dmemory: torch.Tensor | None, dmass: torch.Tensor | None) -> Any:
        x, s, mass, memory = ctx.saved_tensors
        if dmemory is None:
            dmemory = torch.zeros_like(memory)
        fall = (dmemory * memory).sum(-1)
        if dmass is not None:
            fall = fall - dmass
        dx, ds = torch.empty_like(x), torch.empty_like(s)
        for here, part, weights in _parts(x, s, mass, ctx.normalized):
            dx[:, :, here] = (weights @ dmemory).to(x.dtype)
            gain = part @ dmemory.transpose(-1, -2)
            ds[:, :, here] = (weights * (gain - fall[:, :, None]) if ctx.normalized else gain).to(s.dtype)
        return dx, ds, None


def _parts(
    x: torch.Tensor, s: torch.Tensor, mass: torch.Tensor, normalized: bool
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """(where, tokens, their weights), some tokens at a time, in the accumulator's dtype."""
    safe = mass.masked_fill(mass == -torch.inf, 0.0)[:, :, None]
    for first in range(0, x.shape[2], _TOKENS):
        here = slice(first, first + _TOKENS)
        weights = s[:, :, here].to(mass.dtype)
        yield here, x[:, :, here].to(mass.dtype), (weights - safe).exp() if normalized else weights
