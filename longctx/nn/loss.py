"""tiled_loss: cross entropy directly from hidden states; logits exist for one tile of tokens at a time.

Logits are the largest tensor of a language model: V per token, in fp32 and with a gradient of the same size. The loss
is a sum over tokens, so forward computes a tile's logits, its loss, and its gradients of hidden states and head, and
frees the logits. Backward only multiplies these gradients by the incoming one. Nothing is computed twice, and the
head's weight is read in forward only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from longctx.derivative import first_only
from longctx.errors import ModelError
from longctx.nn.entropy import Backend, Loss, choose_backend, loss_and_gradient
from longctx.nn.linear import add_product
from longctx.nn.tiling import Tile, choose_tile

IGNORED = -100


def tiled_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    ignore_index: int = IGNORED,
    tile: Tile = "auto",
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return the sum over tokens of cross entropy + z_loss · lse², with lse the log of the softmax's denominator.

    Value and gradients equal those of ``F.cross_entropy(head(hidden).float(), labels, reduction="sum")``. If every
    label is ignored, the sum is 0 with gradients of 0, computed in the same way. Backward can run only once: it
    consumes what forward has saved (the gradients themselves, the head's in fp32).

    Args:
        hidden: (..., D), any floating dtype; logits are rounded to it as a head's are, the rest is in fp32 (or fp64).
        weight: (V, D), the head's, tied to the embedding or not.
        labels: (...) int64, already shifted; ``ignore_index`` where a token does not count.
        bias: (V,) of the head.
        softcap: bounds logits to (-softcap, softcap): softcap · tanh(x / softcap).
        z_loss: weight of lse² (PaLM's auxiliary loss, about 1e-4).
        tile: tokens whose logits exist at once; "auto" bounds their bytes.
        backend: computes a tile's loss and gradient from its logits: "triton", one kernel in fp32, fp16 or bf16 that
            reads and overwrites them in their own dtype; "torch"; "auto", the kernel on a GPU.

    Returns:
        (), fp32; fp64 for fp64.

    Raises:
        ModelError: shapes or numbers do not fit together, or labels exceed the vocabulary (compiled or on a GPU:
            RuntimeError; on a GPU by a device-side assertion, as in torch).
    """
    _check(hidden, weight, labels, bias, softcap, z_loss)
    _check_labels(labels, weight.shape[0], ignore_index)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = choose_tile(tile, weight.shape[0], hidden.device)
    loss = Loss(softcap, z_loss, ignore_index)
    settings = _Settings(loss, rows, choose_backend(backend, hidden), torch.is_grad_enabled())
    total: torch.Tensor = _TiledLoss.apply(hidden.flatten(0, -2), weight, bias, labels.flatten(), settings)
    return total


@dataclass(frozen=True)
class _Settings:
    loss: Loss
    tile: int
    backend: str
    differentiate: bool


@first_only
class _TiledLoss(torch.autograd.Function):
    """(hidden (N, D), weight (V, D), bias (V,) or None, labels (N,)) -> the sum; forward computes the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        settings: _Settings,
    ) -> torch.Tensor:
        wanted = [settings.differentiate and need for need in ctx.needs_input_grad[:3]]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        dhidden = torch.empty_like(hidden) if wanted[0] else None
        dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if wanted[1] else None
        dbias = torch.zeros(weight.shape[:1], dtype=dtype, device=weight.device) if wanted[2] else None
        for first in range(0, hidden.shape[0], settings.tile):
            part = slice(first, first + settings.tile)
            x = hidden[part]
            loss, dlogits = loss_and_gradient(
                F.linear(x, weight, bias), labels[part], settings.loss,
                backend=settings.backend, differentiate=any(wanted),
            )  # fmt: skip
            total += loss
            if dbias is not None:
                dbias += dlogits.sum(0, dtype=dtype)
            dlogits = dlogits.to(hidden.dtype)
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[part])
            if dweight is not None:
                add_product(dweight, dlogits, x)
            del dlogits  # free before the next tile allocates its logits
        ctx.gradients = dhidden, dweight, dbias
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise ModelError(
                "tiled_loss ran backward twice: it keeps its gradients for one backward; compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(dtotal).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    z_loss: float,
) -> None:
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ModelError(
            f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}: give (..., D) and (V, D) with equal D"
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ModelError(
            f"labels are {tuple(labels.shape)} {labels.dtype}, hidden is {tuple(hidden.shape)}: give int64 labels, "
            "one per token"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ModelError(f"bias is {tuple(bias.shape)}: weight {tuple(weight.shape)} needs ({weight.shape[0]},)")
    if softcap is not None and not softcap > 0:
        raise ModelError(f"softcap={softcap}: give a bound above 0, or None for none")
    if not 0 <= z_loss < float("inf"):
        raise ModelError(f"z_loss={z_loss}: give a finite weight of at least 0")


def _check_labels(labels: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    message = f"labels must be in [0, {vocabulary}), the rows of weight, or ignore_index={ignore_index}"
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        if wrong.any():
            raise ModelError(f"{message}: there is a {int(labels[wrong][0])}")
    else:
        torch._assert_async(~wrong.any(), message)  # does not synchronise with the device
