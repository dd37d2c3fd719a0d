"""The states of bounded attention: plain tensors, batch first, that a cache can hold and reorder."""

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
        """Return the state of the rows `index` (int64), in that order, as beam search reorders them."""
        return self._map(lambda x: x.index_select(0, index.to(x.device)))

    def detach(self) -> Self:
        """Return the state without its autograd history."""
        return self._map(lambda x: x.detach())

    @property
    def rows(self) -> int:
        """B, the number of sequences."""
        return int(getattr(self, fields(self)[0].name).shape[0])  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; independent of the tokens seen."""
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return sum(x.numel() * x.element_size() for x in values if x is not None)


@dataclass(frozen=True)
class ABCState(State):
    """(z, K, V) of docs/methods/abc.md "State"; floating tensors in fp32, fp64 for fp64 inputs.

    log_mass: (B, G, M), z: the log of all weight a slot has received; -inf where nothing was written.
    keys: (B, G, M, D). values: (B, G, M, Dv).
    document: (B,) int64, the document that the state belongs to (-1: no token yet), or None if there is only one.
    value_log_mass: (B, G, M), where values have their own control.
    count: (B,) int64, the tokens of the document so far, where the control depends on positions.
    clusters: (B, G, M, 2 (D + 1)) fp64, the state of the control `cluster`; no gradient flows into it.
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

    memory: S (B, G, D, Dv), or (B, H, D, Dv) where query heads of one group scale the values differently (scale_on
        "value" with H exponents); fp32, fp64 for fp64 inputs.
    count: (B,) int64, the tokens of the document so far, without padding.
    document: as in `ABCState`.
    """

    memory: torch.Tensor
    count: torch.Tensor
    document: torch.Tensor | None = None


@dataclass(frozen=True)
class FifoState(State):
    """The last tokens of a queue control (window, dilated, compressive), oldest first.

    keys (B, G, N, D), values (B, G, N, Dv) in their own dtype. document: (B, N) int64, -1 where there is no token yet.
    index: (B, N) int64, each token's position in its document.
    """

    keys: torch.Tensor
    values: torch.Tensor
    document: torch.Tensor
    index: torch.Tensor
