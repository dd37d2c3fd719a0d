"""Prepare calls of the Triton kernels of ABC and of Cottention.

Importing this file imports triton, so it is imported when that backend is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from longctx.attention.backends.triton import dense
from longctx.bounded.chunks import Runs
from longctx.kernels.cosine.fused import Documents


class ChunkedCall(Protocol):
    """A call of either method's kernels."""

    @property
    def chunk(self) -> int:
        """Tokens per chunk."""


Call = TypeVar("Call", bound=ChunkedCall)


def with_documents(
    make: Callable[[Documents | None], Call], ids: torch.Tensor | None, document: torch.Tensor | None
) -> Call:
    """Make a call with the packed documents it needs: ids (B, T), and the one before them (B,) or None."""
    call = make(None)
    if ids is None:
        return call
    runs = Runs(ids, document)
    edges = runs.edges(call.chunk)
    return make(Documents(runs.ids.contiguous(), edges, (edges[:, 1:] == edges[:, :-1]).float()))


def output_gradient(dout: torch.Tensor | None, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the gradient of out (B, H, T, Dv) with a dense last dimension; None is 0."""
    return q.new_zeros((*q.shape[:3], v.shape[3])) if dout is None else dense(dout)


def state_gradient(dstate: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a state, contiguous; None is 0."""
    return torch.zeros_like(state) if dstate is None else dstate.contiguous()


def empty_like(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return contiguous tensors for the gradients of `tensors`."""
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]
