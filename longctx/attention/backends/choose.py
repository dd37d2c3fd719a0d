"""Choose the backend of a call: the one that the caller names, or the fastest that supports the call."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch

from longctx.attention.backends import measured
from longctx.attention.backends.aten import AtenBackend
from longctx.attention.backends.base import Backend
from longctx.attention.backends.fused_torch import WIDEST, FusedTorchBackend
from longctx.attention.backends.fused_torch import problem as fused_torch_problem
from longctx.attention.backends.reference import ReferenceBackend
from longctx.attention.band import Rule
from longctx.attention.scores import Scores
from longctx.errors import AttentionError

log = logging.getLogger("longctx")


GPU = ("triton", "triton-tma", "cudnn", "flash")
"""Backends for GPUs: our kernels, ours reading through sm_90's copy engine (TMA), torch's operators."""


def choose_backend(name: str, q: torch.Tensor, v: torch.Tensor, scores: Scores, pattern: str = "other") -> Backend:
    """Return the backend of that name; for "auto", the fastest for such tensors, logged once with the reason.

    Args:
        pattern: which keys are visible, see `pattern_of`.

    Raises:
        AttentionError: there is no such backend, or it does not support these tensors or scores.
    """
    device = q.device
    if name == "auto":
        name, reason = fastest(q, v, device.type, scores, pattern)
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
    if name in GPU:
        problem = _gpu_problem(name, q, v, device.type, scores, pattern)
        if problem:
            raise AttentionError(f"backend={name!r}: {problem}; use 'auto' or 'reference'")
        if name in WIDEST:
            return FusedTorchBackend(name)
        from longctx.attention.backends import triton  # imports triton

        return triton.HOPPER if name == "triton-tma" else triton.TritonBackend()
    raise AttentionError(f"backend={name!r} is unknown; use 'auto', 'aten', 'reference', {', '.join(map(repr, GPU))}")


def pattern_of(rule: Rule, documents: torch.Tensor | None) -> str:
    """Return "full" or "causal" if nothing else hides a key; "other" with a window, documents or padding."""
    if documents is not None or rule.left is not None or rule.length is not None or rule.right not in (None, 0):
        return "other"
    return "full" if rule.right is None else "causal"


def fastest(q: torch.Tensor, v: torch.Tensor, device: str, scores: Scores, pattern: str = "other") -> tuple[str, str]:
    """Return (backend, why) for such tensors on that type of device."""
    if device == "cpu":
        if scores.extras:
            return "reference", f"torch's fused CPU operator cannot do {' and '.join(scores.extras)}"
        return "aten", "torch's fused flash attention for CPUs"
    problem = triton_problem(q, v, device)
    if problem:
        return "reference", f"{problem}, so plain PyTorch tiles: correct and slow"
    chip = _chip(q.device, device)
    call = measured.Call(
        str(q.dtype).removeprefix("torch."),
        max(q.shape[-1], v.shape[-1]),
        q.shape[1] // v.shape[1],
        pattern != "full",
        q.shape[2],
    )
    able = tuple(name for name in GPU if not _gpu_problem(name, q, v, device, scores, pattern))
    row = measured.best(measured.read(), chip, call, able)
    if row is None:
        return "triton", f"our fused kernels: proven in triton's interpreter, nothing like this call measured on {chip}"
    near = f"{'causal' if row.call.causal else 'full'} {row.call.dtype}, head dimension {row.call.head_dim}"
    return row.backend, f"measured fastest on {chip} for {near}, from {row.call.length} tokens"


def _gpu_problem(name: str, q: torch.Tensor, v: torch.Tensor, device: str, scores: Scores, pattern: str) -> str:
    """Return why that backend of GPU cannot compute such a call; empty if it can."""
    if name in WIDEST:
        if device != "cuda" or torch.version.hip:
            return f"it needs an NVIDIA GPU, and the tensors are on {device}"
        return fused_torch_problem(name, q, v, scores, pattern != "other")
    problem = triton_problem(q, v, device)
    if not problem and name == "triton-tma" and q.device.type == "cuda":
        capability = torch.cuda.get_device_capability(q.device)
        if torch.version.hip or capability != (9, 0):
            return "it needs sm_90's copy engine (Hopper: H100, H200)"
    return problem


def triton_problem(q: torch.Tensor, v: torch.Tensor, device: str) -> str:
    """Return why the Triton kernels of attention cannot take such tensors; empty if they can."""
    problem = why_not_triton(q, device)
    if problem:
        return problem
    if q.dtype == torch.bfloat16 and device != "cuda":
        return "triton's interpreter computes bfloat16 products wrongly"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"its kernels take head dimensions up to 256, not {max(q.shape[-1], v.shape[-1])}"
    return ""


def why_not_triton(x: torch.Tensor, device: str | None = None) -> str:
    """Return why no Triton kernel can take ``x``, on ``device`` if given; empty if one can."""
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    device = device or x.device.type
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (torch's CUDA and ROCm builds bring it)"
    if device != "cuda" and not interpreted:
        return f"the tensors are on {device}, and triton's kernels need a GPU (or its interpreter, TRITON_INTERPRET=1)"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels have no {str(x.dtype).removeprefix('torch.')}"
    return ""


@cache
def _chip(device: torch.device, kind: str) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else kind


@cache
def _announce(device_type: str, name: str, reason: str) -> None:
    log.info("attention on %s: backend %r (%s)", device_type, name, reason)
