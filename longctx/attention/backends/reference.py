"""The plain PyTorch backend: any device, any dtype, tiles in fp32 or fp64. Slow, and right."""

from __future__ import annotations

import torch

from longctx.attention.backends.base import Rows, accumulator_dtype
from longctx.attention.mask import BlockMask
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
        scale: float,
        out: torch.Tensor,
        lse: torch.Tensor,
        first: bool,
    ) -> None:
        if first:
            out.zero_()
            lse.fill_(-torch.inf)
        reference.forward(q, k, v, mask, scale, out, lse)

    def prepare_backward(self, rows: Rows) -> tuple[Rows, torch.Tensor]:
        dtype = accumulator_dtype(rows.q.dtype)
        delta = (rows.out.to(dtype) * rows.dout).sum(-1)
        return rows, delta if rows.dlse is None else delta - rows.dlse

    def backward_step(
        self,
        prepared: tuple[Rows, torch.Tensor],
        k: torch.Tensor,
        v: torch.Tensor,
        mask: BlockMask,
        scale: float,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        first: bool,
    ) -> None:
        for gradient in (dq, dk, dv) if first else (dk, dv):
            gradient.zero_()
        rows, delta = prepared
        reference.backward(rows.dout, rows.q, k, v, rows.lse, delta, mask, scale, dq, dk, dv)
