"""The softmax merge: combine partial results (out, lse) over two disjoint sets of keys.

Partials form a commutative monoid with identity (0, -inf); chunks, ring steps and cached shards are all merged here.
With lse = logaddexp(a, b), the second partial's weight is exp(b - lse) = sigmoid(b - a). This never takes the
exponential of a large number, so it does not overflow where a and b differ by 89 or more. The one undefined case, two
empty sets, gets weight 0.
"""

from __future__ import annotations

import torch

Partial = tuple[torch.Tensor, torch.Tensor]


def identity(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None = None) -> Partial:
    """Return attention over no keys: out = 0 of `shape` (..., T, D) and lse = -inf of (..., T)."""
    return torch.zeros(shape, dtype=dtype, device=device), torch.full(
        shape[:-1], -torch.inf, dtype=dtype, device=device
    )


def merge(first: Partial, second: Partial) -> Partial:
    """Return attention over the union of two disjoint sets of keys.

    Args:
        first, second: (out (..., T, D), lse (..., T)), both of one floating dtype.

    Returns:
        new tensors (out, lse); a row that saw no key in either set has out 0 and lse -inf.
    """
    out, lse = first[0].clone(), first[1].clone()
    merge_(out, lse, *second)
    return out, lse


def merge_(out: torch.Tensor, lse: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor) -> None:
    """Merge a block's result into the running (out, lse), in place and without a full-size temporary.

    Args:
        out (..., T, D), lse (..., T): the accumulators, fp32 or fp64.
        block_out (..., T, D), block_lse (..., T): the block's result, in any floating dtype.
    """
    block_lse = block_lse.to(lse.dtype)
    weight = torch.sigmoid(block_lse - lse).nan_to_num_(0.0)  # NaN only if both are -inf: there is nothing to add
    torch.logaddexp(lse, block_lse, out=lse)
    out.lerp_(block_out.to(out.dtype), weight.unsqueeze(-1))
