"""The simplest method that has a state, for tests of what ABC and Cottention share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longctx.bounded.inputs import SequenceInputs
from longctx.bounded.ranks import monoid
from longctx.bounded.ranks.exchange import Value


@dataclass(frozen=True)
class Sums(SequenceInputs):
    """A query (B, H, T, 1) reads itself times the sum of the values."""

    def write(self, tokens: torch.Tensor | None, document: torch.Tensor) -> Value:
        v = self.v if tokens is None else self.v.masked_fill(~tokens[:, None, :, None], 0.0)
        return v.sum(2, keepdim=True), document

    def combine(self, first: Value, second: Value) -> Value:
        return monoid.add(first, second)

    def read(self, state: Value) -> torch.Tensor:
        return self.q * state[0].repeat_interleave(self.q.shape[1] // self.k.shape[1], 1)


def sums(batch: int, queries: int, keys: int, seed: int = 0) -> Sums:
    """Return random inputs of 4 query heads and 2 key heads; padding must be given as 0 or masked."""
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, 4, queries, 1), (batch, 2, keys, 1), (batch, 2, keys, 3)
    return Sums(*(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes))


def expected(x: Sums, seen: torch.Tensor) -> torch.Tensor:
    """Return the outputs where query t reads the values of the tokens seen (B or 1, T, T)."""
    return x.q * (seen[:, None].double() @ x.v.repeat_interleave(2, 1))
