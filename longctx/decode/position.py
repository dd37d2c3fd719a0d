"""Biases of logits by position, computed tile by tile: ALiBi's slopes and T5's buckets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """T5's relative-position bias: a table indexed by the bucket of the distance.

    Half of the buckets hold one distance each, the widths of the other half grow geometrically up to `max_distance`. A
    bidirectional table uses half of all buckets for keys to the right.
    """

    table: torch.Tensor
    """(buckets, H)."""
    max_distance: int = 128
    bidirectional: bool = False

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return (H, T, n) for the int64 positions of queries (T,) and keys (n,)."""
        return self.table[self.buckets(keys[None, :] - queries[:, None])].movedim(-1, 0)

    def buckets(self, right: torch.Tensor) -> torch.Tensor:
        """Return the bucket of each distance, key - query, int64."""
        count, shift = self.table.shape[0], torch.zeros_like(right)
        if self.bidirectional:
            count //= 2
            shift, distance = (right > 0) * count, right.abs()
        else:
            distance = (-right).clamp(min=0)
        exact = count // 2
        # In fp32, as in the models that trained the tables, so that every bucket has the same edges.
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (count - exact)).to(torch.int64)).clamp(max=count - 1)
        return shift + torch.where(distance < exact, distance, far)


@dataclass(frozen=True, eq=False)
class Alibi:
    """ALiBi: subtract slope * |i - j| from the logit of query i and key j."""

    slopes: torch.Tensor
    """(H,)."""

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return (H, T, n) for the positions of queries (T,) and keys (n,)."""
        return -self.slopes[:, None, None] * (queries[:, None] - keys[None, :]).abs()
