"""The plain PyTorch backend: any device and dtype, computed tile by tile in fp32 or fp64. Slow; other backends are
tested against it."""

from __future__ import annotations

import torch

from longctx.attention.backends.base import BackwardQueries, KeyBlock, StepGradients, delta_of
from longctx.kernels.flash import reference


class ReferenceBackend:
    """kernels/flash/reference.py behind the Backend protocol."""

    name = "reference"

    def forward_step(self, q: torch.Tensor, block: KeyBlock, out: torch.Tensor, lse: torch.Tensor, first: bool) -> None:
        if first:
            out.zero_()
            lse.fill_(-torch.inf)
        reference.forward(q, block.k, block.v, block.mask, block.scores, out, lse)

    def prepare_backward(self, queries: BackwardQueries) -> tuple[BackwardQueries, torch.Tensor]:
        return queries, delta_of(queries)

    def backward_step(
        self, prepared: tuple[BackwardQueries, torch.Tensor], block: KeyBlock, gradients: StepGradients, first: bool
    ) -> None:
        dq, dk, dv, dalibi = gradients
        for gradient in (dq, dk, dv) if first else (dk, dv):
            gradient.zero_()
        (queries, delta), k, v = prepared, block.k, block.v
        reference.backward(
            queries.dout, queries.q, k, v, queries.lse, delta, block.mask, block.scores, dq, dk, dv, dalibi
        )
