"""The protocol of a backend: the arithmetic of one ring step on one device. A backend knows nothing of ranks.

A step updates the running results (fp32, or fp64 for fp64 inputs) in place, so a fused kernel needs one launch per step
and no separate merge. To add a backend, implement `Backend` and name it in `choose.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from longctx.attention.mask import BlockMask
from longctx.attention.scores import Scores


@dataclass(frozen=True)
class BackwardQueries:
    """What backward needs of this rank's queries, for all steps.

    q (B, H, Tq, Dk); out, dout (B, H, Tq, Dv) in q's dtype; lse (B, H, Tq) over all keys, -inf for a row that saw none;
    dlse (B, H, Tq), or None if the lse has no gradient.
    """

    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor | None


@dataclass(frozen=True)
class KeyBlock:
    """One block of keys k (B, G, Tk, Dk) and values v (B, G, Tk, Dv), which of them each query sees, and how logits are
    computed."""

    k: torch.Tensor
    v: torch.Tensor
    mask: BlockMask
    scores: Scores


class StepGradients(NamedTuple):
    """Where one step of backward writes, in the accumulator's dtype: dq like q, dk and dv like the block's k and v,
    dalibi (H,) or None without slopes."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dalibi: torch.Tensor | None


class Backend(Protocol):
    """The arithmetic of one step; kernels/flash/reference.py has the formulas.

    Implementations: triton.py, aten.py, fused_torch.py and reference.py beside this file, chosen by choose.py.
    """

    @property
    def name(self) -> str: ...

    def forward_step(self, q: torch.Tensor, block: KeyBlock, out: torch.Tensor, lse: torch.Tensor, first: bool) -> None:
        """Merge attention of q (B, H, Tq, Dk) to the block into the running out (B, H, Tq, Dv) and lse (B, H, Tq).

        first: out and lse are uninitialised, and every row is written.
        """

    def prepare_backward(self, queries: BackwardQueries) -> Any:
        """Return what all steps of one backward share, computed once (delta, for instance)."""

    def backward_step(self, prepared: Any, block: KeyBlock, gradients: StepGradients, first: bool) -> None:
        """Add the block's part to dq and dalibi, and overwrite dk and dv.

        first: dq is uninitialised, and every row is written. dalibi always holds zeros or earlier steps' sum.
        """


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which out, lse, dq, dk and dv are summed over the ring: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def delta_of(queries: BackwardQueries) -> torch.Tensor:
    """Return delta (B, H, Tq) = rowsum(dO * O) - dLSE: all that the gradients of the softmax and of the lse need."""
    delta = (queries.out.to(queries.lse.dtype) * queries.dout).sum(-1)
    return delta if queries.dlse is None else delta - queries.dlse
