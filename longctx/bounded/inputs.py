"""The inputs of one call of ABC or Cottention, and the methods that both need for whole sequences."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from longctx.attention.backends.base import accumulator_dtype
from longctx.bounded.ranks.exchange import Value


@dataclass(frozen=True)
class SequenceInputs:
    """q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv); subclasses add their own tensors and settings.

    The state of a contiguous stretch of tokens is a `Value`: tensors that `combine` merges, and last its document (B,).
    """

    per_token: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    """Fields that have a token dimension, the third; None values are left out."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @abstractmethod
    def write(self, tokens: torch.Tensor | None, document: torch.Tensor) -> Value:
        """Return the state that `tokens` (B, T) bool, None for all, write; they belong to `document` (B,)."""

    @abstractmethod
    def combine(self, first: Value, second: Value) -> Value:
        """Combine the states of two stretches, the earlier one first."""

    @abstractmethod
    def read(self, state: Value) -> torch.Tensor:
        """Return what all queries read of one state: (B, H, T, Dv) in q's dtype."""

    def attend_all(self) -> torch.Tensor:
        """Let every query read all tokens, which are valid and belong to one document."""
        return self.read(self.write(None, torch.zeros(len(self.k), dtype=torch.int64, device=self.k.device)))

    def part(self, here: slice) -> Self:
        """Return the inputs of a slice of the tokens."""
        return self._map(lambda x: x[:, :, here])

    def document(self, row: int, tokens: torch.Tensor) -> Self:
        """Return the inputs of some tokens (n,) of one row."""
        return self._map(lambda x: x[row : row + 1].index_select(2, tokens))

    def clear_queries(self, valid: torch.Tensor | None) -> Self:
        """Return the inputs with queries of 0 at padding; valid: (B, T) bool."""
        return self if valid is None else replace(self, q=self.q.masked_fill(~valid[:, None, :, None], 0.0))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of states and sums."""
        return accumulator_dtype(self.q.dtype)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        fields = {name: getattr(self, name) for name in self.per_token}
        return replace(self, **{name: change(x) for name, x in fields.items() if x is not None})
