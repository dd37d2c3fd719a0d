"""The plain PyTorch backend: any device, any dtype, tiles in fp32 or fp64. Slow, and right."""

from __future__ import annotations

import torch

from longctx.attention.backends.base import Rows, delta_of
from longctx.attention.mask import BlockMask
from longctx.attention.scores import Scores
from longctx.kernels.flash import reference


class ReferenceBackend:
    """kernels/flash/reference.py behind the Backend protocol."""

    name = "reference"

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
        if first:
            out.zero_()
            lse.fill_(-torch.inf)
        reference.forward(q, k, v, mask, scores, out, lse)

    def prepare_backward(self, rows: Rows) -> tuple[Rows, torch.Tensor]:
        return rows, delta_of(rows)

    def backward_step(
        self,
        prepared: tuple[Rows, torch.Tensor],
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
        for gradient in (dq, dk, dv) if first else (dk, dv):
            gradient.zero_()
        rows, delta = prepared
        reference.backward(rows.dout, rows.q, k, v, rows.lse, delta, mask, scores, dq, dk, dv, dalibi)
