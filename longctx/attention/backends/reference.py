"""The plain PyTorch backend: any device and dtype, computed tile by tile in fp32 or fp64. Slow; other backends are
tested against it."""

from __future__ import annotations

import torch

from longctx.attention.backends.base import KeyBlock, Rows, StepGradients, delta_of
from longctx.kernels.flash import reference


class ReferenceBackend:
    """kernels/flash/reference.py behind the Backend protocol."""

    name = "reference"

    def forward_step(self, q: torch.Tensor, block: KeyBlock, out: torch.Tensor, lse: torch.Tensor, first: bool) -> None:
        if first:
            out.zero_()
            lse.fill_(-torch.inf)
        reference.forward(q, block.k, block.v, block.mask, block.scores, out, lse)

    def prepare_backward(self, rows: Rows) -> tuple[Rows, torch.Tensor]:
        return rows, delta_of(rows)

    def backward_step(
        self, prepared: tuple[Rows, torch.Tensor], block: KeyBlock, gradients: StepGradients, first: bool
    ) -> None:
        dq, dk, dv, dalibi = gradients
        for gradient in (dq, dk, dv) if first else (dk, dv):
            gradient.zero_()
        (rows, delta), k, v = prepared, block.k, block.v
        reference.backward(rows.dout, rows.q, k, v, rows.lse, delta, block.mask, block.scores, dq, dk, dv, dalibi)
