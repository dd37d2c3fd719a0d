"""Which backend computes a call: the one asked for, or the fastest that can do it."""

from __future__ import annotations

import logging
from functools import cache

import torch

from longctx.attention.backends.aten import AtenBackend
from longctx.attention.backends.base import Backend
from longctx.attention.backends.reference import ReferenceBackend
from longctx.attention.scores import Scores
from longctx.errors import AttentionError

log = logging.getLogger("longctx")


def choose_backend(name: str, q: torch.Tensor, v: torch.Tensor, scores: Scores) -> Backend:
    """The backend of that name, or the fastest for such tensors if `name` is "auto" (announced once, with the reason).

    Raises:
        AttentionError: unknown, or not available for this device or these scores.
    """
    device = q.device
    if name == "auto":
        name, reason = _best(device.type, scores)
        _announce(device.type, name, reason)
    if name == "reference":
        return ReferenceBackend()
    if name == "aten":
        if device.type != "cpu":
            raise AttentionError(
                f"backend='aten' is torch's CPU operator, and the tensors are on {device}; use 'reference'"
            )
        if scores.extras:
            raise AttentionError(f"backend='aten' cannot do {' and '.join(scores.extras)}; use 'auto' or 'reference'")
        return AtenBackend()
    if name == "triton":
        raise AttentionError("backend='triton' is not part of this version; use 'auto', 'aten' (CPU) or 'reference'")
    raise AttentionError(f"backend={name!r} is unknown; use 'auto', 'aten', 'reference' or 'triton'")


def _best(device_type: str, scores: Scores) -> tuple[str, str]:
    if device_type == "cpu":
        if scores.extras:
            return "reference", f"torch's fused CPU operator cannot do {' and '.join(scores.extras)}"
        return "aten", "torch's fused flash attention for CPUs"
    return "reference", f"no fused kernel for {device_type} in this version, so plain PyTorch tiles: correct and slow"


@cache
def _announce(device_type: str, name: str, reason: str) -> None:
    log.info("attention on %s: backend %r (%s)", device_type, name, reason)
