"""Which backend computes a call: the one asked for, or the fastest that can do it."""

from __future__ import annotations

import importlib.util
import logging
import os
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
        AttentionError: unknown, or not available for these tensors or these scores.
    """
    device = q.device
    if name == "auto":
        name, reason = fastest(q, v, device.type, scores)
        _announce(device.type, name, reason)
    if name == "reference":
        return ReferenceBackend()
    if name == "aten":
        if device.type != "cpu":
            raise AttentionError(
                f"backend='aten' is torch's CPU operator, and the tensors are on {device}; use 'triton' or 'reference'"
            )
        if scores.extras:
            raise AttentionError(f"backend='aten' cannot do {' and '.join(scores.extras)}; use 'auto' or 'reference'")
        return AtenBackend()
    if name == "triton":
        problem = _triton_problem(q, v, device.type)
        if problem:
            raise AttentionError(f"backend='triton': {problem}; use 'auto' or 'reference'")
        from longctx.attention.backends.triton import TritonBackend  # imports triton

        return TritonBackend()
    raise AttentionError(f"backend={name!r} is unknown; use 'auto', 'aten', 'reference' or 'triton'")


def fastest(q: torch.Tensor, v: torch.Tensor, device: str, scores: Scores) -> tuple[str, str]:
    """(backend, why) for tensors like these on that type of device."""
    if device == "cpu":
        if scores.extras:
            return "reference", f"torch's fused CPU operator cannot do {' and '.join(scores.extras)}"
        return "aten", "torch's fused flash attention for CPUs"
    problem = _triton_problem(q, v, device)
    if problem:
        return "reference", f"{problem}, so plain PyTorch tiles: correct and slow"
    return "triton", "our fused kernels: proven in triton's interpreter, not yet run on a GPU by us"


def _triton_problem(q: torch.Tensor, v: torch.Tensor, device: str) -> str:
    """Why the Triton kernels cannot take such tensors; empty if they can."""
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (torch's CUDA and ROCm builds bring it)"
    if device != "cuda" and not interpreted:
        return f"the tensors are on {device}, and triton's kernels need a GPU (or its interpreter, TRITON_INTERPRET=1)"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels have no {str(q.dtype).removeprefix('torch.')}"
    if q.dtype == torch.bfloat16 and interpreted and device != "cuda":
        return "triton's interpreter computes bfloat16 products wrongly"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"its kernels take head dimensions up to 256, not {max(q.shape[-1], v.shape[-1])}"
    return ""


@cache
def _announce(device_type: str, name: str, reason: str) -> None:
    log.info("attention on %s: backend %r (%s)", device_type, name, reason)
