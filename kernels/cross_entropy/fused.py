"""Build the launch of the cross entropy kernel; it does not wait for the device."""

from __future__ import annotations

import torch

from ..flash.launch import Launch
from . import tiles
from .row import row_kernel


def launch(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss: torch.Tensor,
    *,
    softcap: float | None,
    z_loss: float,
    ignore_index: int,
    gradient: bool,
    arch: str,
) -> Launch:
    """Return the launch that writes each row's loss and, if ``gradient``, overwrites the logits with their gradient.

    Args:
        logits: (n, V) in bf16, fp16 or fp32, rows dense.
        labels: (n,) int64, dense.
        loss: (n,) fp32, dense.
        arch: the chip as tiles.py names it.
    """
    rows, vocabulary = logits.shape
    config = tiles.choose(vocabulary, arch)
    arguments = dict(
        logits=logits, labels=labels, loss=loss, stride=logits.stride(0), vocabulary=vocabulary,
        ignore_index=ignore_index, z_loss=z_loss, softcap=1.0 if softcap is None else softcap, WIDTH=config.width,
        CAPPED=softcap is not None, GRADIENT=gradient,
    )  # fmt: skip
    return Launch(row_kernel, (rows,), arguments, config.warps)
