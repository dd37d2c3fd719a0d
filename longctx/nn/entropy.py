"""Cross entropy of one tile of logits, overwritten by their gradient: by a kernel on a GPU, else by torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from longctx.attention.backends.choose import why_not_triton
from longctx.errors import ModelError

Backend = Literal["auto", "torch", "triton"]
BACKENDS = ("auto", "torch", "triton")


@dataclass(frozen=True)
class Loss:
    """The loss per token: lse - x[label] + z_loss · lse², for logits x bounded by ± softcap."""

    softcap: float | None
    z_loss: float
    ignore_index: int


def check_backend(backend: str) -> None:
    """Raise ModelError if there is no such backend."""
    if backend not in BACKENDS:
        raise ModelError(f"backend={backend!r}: use one of {', '.join(map(repr, BACKENDS))}")


def choose_backend(backend: str, hidden: torch.Tensor) -> str:
    """Return "torch" or "triton"; "auto" is the kernel on a GPU if it supports the input.

    Raises:
        ModelError: an unknown backend, or one that cannot compute this.
    """
    check_backend(backend)
    if backend == "torch" or (backend == "auto" and hidden.device.type != "cuda"):
        return "torch"
    problem = why_not_triton(hidden)
    if problem and backend == "triton":
        raise ModelError(f"backend='triton': {problem}; use 'auto' or 'torch'")
    return "torch" if problem else "triton"


def loss_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, loss: Loss, *, backend: str, differentiate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a tile's loss (), fp32 or fp64, and the gradient of its logits; the logits are overwritten.

    Args:
        logits: (n, V), any floating dtype; the arithmetic is in fp32 (fp64 for fp64).
        labels: (n,) int64, in [0, V) or the loss's ignore_index.
        backend: "torch" or "triton".
        differentiate: whether the gradient is needed; else the second result is undefined.

    Returns:
        The loss; the gradient (n, V), from torch in fp32 or fp64, from the kernel in the logits' dtype and storage.
    """
    if backend == "triton":
        rows = _tile(logits, labels, loss.softcap, loss.z_loss, loss.ignore_index, differentiate)
        return rows.sum(), logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _in_torch(logits, labels, loss, differentiate), logits


def _in_torch(logits: torch.Tensor, labels: torch.Tensor, loss: Loss, differentiate: bool) -> torch.Tensor:
    """Return a tile's loss, and overwrite its logits (n, V) with their gradient; no second tile is allocated.

    With p = softmax(x), lse = log Σ exp(x): loss = lse − x[label] + z · lse², d loss / dx = (1 + 2 z lse) p − onehot.
    """
    slope = None
    if loss.softcap is not None:
        logits.div_(loss.softcap).tanh_()
        if differentiate:
            slope = logits.square().neg_().add_(1)
        logits.mul_(loss.softcap)
    valid = labels != loss.ignore_index
    labels = labels.masked_fill(~valid, 0)
    index = torch.arange(len(labels), device=labels.device)
    picked = logits[index, labels]
    largest = logits.amax(-1, keepdim=True)
    denominator = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    lse = (largest + denominator.log()).squeeze(-1)
    total = (lse - picked + loss.z_loss * lse.square()).masked_fill(~valid, 0.0).sum()
    if differentiate:
        weight = (1 + 2 * loss.z_loss * lse).masked_fill(~valid, 0.0)
        logits.mul_(weight[:, None] / denominator)
        logits[index, labels] -= valid.to(logits.dtype)
        if slope is not None:
            logits.mul_(slope)
    return total


@torch.library.custom_op("longctx::cross_entropy_tile", mutates_args=("logits",))
def _tile(
    logits: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None,
    z_loss: float,
    ignore_index: int,
    gradient: bool,
) -> torch.Tensor:
    """Return each row's loss (n,) in fp32; overwrite the logits with their gradient if `gradient`."""
    from longctx.attention.backends.triton import arch, on_device
    from longctx.kernels.cross_entropy.fused import launch

    loss = _losses(logits)
    with on_device(logits.device):
        launch(
            logits, labels.contiguous(), loss, softcap=softcap, z_loss=z_loss, ignore_index=ignore_index,
            gradient=gradient, arch=arch(logits.device),
        ).run()  # fmt: skip
    return loss


@_tile.register_fake
def _fake(logits: torch.Tensor, *rest: object) -> torch.Tensor:
    return _losses(logits)


def _losses(logits: torch.Tensor) -> torch.Tensor:
    return torch.empty(logits.shape[:1], dtype=torch.float32, device=logits.device)
