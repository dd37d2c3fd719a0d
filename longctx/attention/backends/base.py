"""What a backend is: the arithmetic of one ring step, on one device, knowing nothing of ranks.

A step continues running fp32 (fp64 for fp64 inputs) results in place, so a fused kernel needs one launch a step and no
separate merge pass. To add one: write these methods, and name it in `block.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from longctx.attention.mask import BlockMask
from longctx.attention.scores import Scores


@dataclass(frozen=True)
class Rows:
    """All that backward needs of this rank's queries; it stays here while keys and values pass by.

    q (B, H, Tq, Dk); out, dout (B, H, Tq, Dv) in q's dtype; lse (B, H, Tq) over all keys, -inf where a row saw none;
    dlse (B, H, Tq) or None where the lse has no gradient.
    """

    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor | None


class Backend(Protocol):
    """One step's arithmetic. Shapes and meanings as in kernels/flash/reference.py."""

    @property
    def name(self) -> str: ...

    def forward_step(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: BlockMask,
        scores: Scores,
        out: torch.Tensor,
        lse: torch.Tensor,
        first: bool,
    ) -> None:
        """Merge attention to these keys into the running (out, lse); if `first`, these hold nothing yet (not even
        zeros) and every row is written."""

    def prepare_backward(self, rows: Rows) -> Any:
        """What can be computed once from the rows before the first step (delta, say); handed to every step."""

    def backward_step(
        self,
        prepared: Any,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: BlockMask,
        scores: Scores,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        first: bool,
        dalibi: torch.Tensor | None,
    ) -> None:
        """Add this block's part to dq (if `first`: write it), and write this block's dk and dv.

        dalibi (H,) in the accumulator's dtype is added to, also if `first`; None where `scores.alibi` is.
        """


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32: out, lse, dq, dk, dv are summed in it over the ring."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def delta_of(rows: Rows) -> torch.Tensor:
    """(B, H, Tq): rowsum(dO * O) - dLSE, all that the gradients of the softmax and of the lse need of a row."""
    delta = (rows.out.to(rows.lse.dtype) * rows.dout).sum(-1)
    return delta if rows.dlse is None else delta - rows.dlse
