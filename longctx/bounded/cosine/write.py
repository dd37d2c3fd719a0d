"""The state that a stretch of tokens writes in cosine attention, S = sum_j N(k_j) (size_j v_j)^T; N(x) = x / ||x||.

This is what a rank sends to others, and all that non-causal attention needs. Only the inputs are saved for backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from longctx.attention.backends.base import accumulator_dtype
from longctx.bounded.chunks import pieces, times
from longctx.bounded.cosine.chunks import through_unit, unit
from longctx.derivative import first_only


def write_state(
    k: torch.Tensor, v: torch.Tensor, size: torch.Tensor | None, tokens: torch.Tensor | None
) -> torch.Tensor:
    """Return S (B, G, D, Dv) in fp32, fp64 for fp64; differentiable.

    Args:
        k: (B, G, T, D). v: (B, G, T, Dv). size: (B, G, T) multiplies the values; None is 1.
        tokens: (B, T) bool, which tokens are written; the others may hold any value, NaN included. None: all.
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
        for part in _normalized(k, v, size, tokens):
            state += part.unit_k.transpose(-1, -2) @ times(part.v, part.size)
        return state

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        k, v, size, tokens = ctx.saved_tensors
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        dsize = None if size is None else torch.empty_like(size)
        for part in _normalized(k, v, size, tokens):
            dscaled = part.unit_k @ gradient  # of size_j v_j
            dunit = times(part.v, part.size) @ gradient.transpose(-1, -2)
            dk[:, :, part.here] = through_unit(dunit, part.unit_k, part.norm).to(k.dtype)
            if dsize is not None:
                dsize[:, :, part.here] = (dscaled * part.v).sum(-1).to(dsize.dtype)
            dv[:, :, part.here] = times(dscaled, part.size).to(v.dtype)
        return dk, dv, dsize, None


class _Part(NamedTuple):
    """A slice of the tokens: unit keys and their norms, values, size (B, G, n, 1) or None."""

    here: slice
    unit_k: torch.Tensor
    norm: torch.Tensor
    v: torch.Tensor
    size: torch.Tensor | None


def _normalized(
    k: torch.Tensor, v: torch.Tensor, size: torch.Tensor | None, tokens: torch.Tensor | None
) -> Iterator[_Part]:
    """Yield the tokens in parts, in the accumulator's dtype, with 0 for those that are not written."""
    dtype = accumulator_dtype(k.dtype)
    for here, absent in pieces(k.shape[2], tokens):
        keys, values = (x[:, :, here].to(dtype) for x in (k, v))
        if absent is not None:
            keys, values = keys.masked_fill(absent, 0.0), values.masked_fill(absent, 0.0)
        yield _Part(here, *unit(keys), values, None if size is None else size[:, :, here, None].to(dtype))
