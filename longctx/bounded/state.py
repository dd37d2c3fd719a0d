"""What a bounded memory carries from token to token: plain tensors, batch first, that a cache can hold and reorder."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch


class State:
    """A frozen dataclass of tensors (or None) whose first dimension is the batch."""

    def _map(self, change: object) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return type(self)(**{name: None if x is None else change(x) for name, x in values.items()})  # type: ignore

    def select(self, index: torch.Tensor) -> Self:
        """The state of the sequences `index` (int64), in that order: beam search's reorder."""
        return self._map(lambda x: x.index_select(0, index.to(x.device)))

    def detach(self) -> Self:
        """The same numbers without their history."""
        return self._map(lambda x: x.detach())

    @property
    def rows(self) -> int:
        """B, the sequences it is the state of."""
        return int(getattr(self, fields(self)[0].name).shape[0])  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; independent of the tokens seen."""
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return sum(x.numel() * x.element_size() for x in values if x is not None)


@dataclass(frozen=True)
class ABCState(State):
    """(z, K, V) of docs/methods/abc.md "State"; floating tensors in fp32, fp64 for fp64 inputs.

    log_mass: (B, G, M), the log of all weight a slot has received; -inf where nothing was written.
    keys: (B, G, M, D). values: (B, G, M, Dv).
    document: (B,) int64, the document that the memory belongs to (-1: no token yet), or None if there is only one.
    value_log_mass: (B, G, M) where values have a control of their own.
    count: (B,) int64, the tokens of the document so far, where the control goes by position.
    clusters: (B, G, M, 2 (D + 1)) fp64, what the control `cluster` goes on from; no gradient flows into it.
    """

    log_mass: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    document: torch.Tensor | None = None
    value_log_mass: torch.Tensor | None = None
    count: torch.Tensor | None = None
    clusters: torch.Tensor | None = None


@dataclass(frozen=True)
class CosineState(State):
    """(S, count) of docs/methods/cottention.md "State".

    memory: (B, G, D, Dv), or (B, H, D, Dv) where query heads of one group scale the values differently (scale_on
        "value" with H exponents); fp32, fp64 for fp64 inputs.
    count: (B,) int64, the tokens of the document so far, padding not counted.
    document: as in `ABCState`.
    """

    memory: torch.Tensor
    count: torch.Tensor
    document: torch.Tensor | None = None


@dataclass(frozen=True)
class FifoState(State):
    """The last tokens of a queue control (window, dilated, compressive), oldest first.

    keys (B, G, N, D), values (B, G, N, Dv) in their own dtype. document: (B, N) int64, -1 where nothing was seen yet.
    index: (B, N) int64, each token's place in its document.
    """

    keys: torch.Tensor
    values: torch.Tensor
    document: torch.Tensor
    index: torch.Tensor
