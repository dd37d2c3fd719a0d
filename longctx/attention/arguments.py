"""Check the arguments of an attention operator. Only shapes, dtypes and numbers: no check reads a tensor's data."""

from __future__ import annotations

import math

import torch

from longctx.errors import AttentionError

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""2^64 divided by the golden ratio, as an int64: its multiples differ in all bits, so they are good seeds."""


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Require q (B, H, Tq, Dk), k (B, G, Tk, Dk), v (B, G, Tk, Dv), G dividing H, no dimension empty, one floating
    dtype and one device."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise AttentionError(f"{shapes}: expected q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv)")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise AttentionError(
            f"{shapes}: batch sizes must agree, k and v must agree in heads and tokens, q and k in the last dimension"
        )
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise AttentionError(f"{shapes}: no dimension may be empty")
    if q.shape[1] % k.shape[1]:
        raise AttentionError(f"{shapes}: the {k.shape[1]} key heads must divide the {q.shape[1]} query heads")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise AttentionError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: give all three in one floating-point dtype")
    if not q.device == k.device == v.device:
        raise AttentionError(f"q on {q.device}, k on {k.device}, v on {v.device}: put all three on one device")


def check_documents(name: str, ids: torch.Tensor | None, like: torch.Tensor) -> None:
    """Require integers (B, T) on the device of `like` (B, heads, T, D)."""
    if ids is None:
        return
    expected = (like.shape[0], like.shape[2])
    if tuple(ids.shape) != expected or ids.is_floating_point() or ids.dtype == torch.bool or ids.is_complex():
        raise AttentionError(
            f"{name} {tuple(ids.shape)} of {ids.dtype}: expected integers of shape (B, T) = {expected}"
        )
    if ids.device != like.device:
        raise AttentionError(f"{name} on {ids.device}, but the tensors are on {like.device}")


def check_scores(
    q: torch.Tensor,
    *,
    softcap: float | None,
    sink: torch.Tensor | None,
    alibi: torch.Tensor | None,
    dropout_p: float,
    dropout_seed: int | torch.Tensor | None,
) -> None:
    """Require a positive cap, sink and alibi (H,), 0 <= dropout_p < 1, and a seed if anything is dropped."""
    if softcap is not None and not softcap > 0:
        raise AttentionError(f"softcap={softcap}: give a positive number, or None for no cap")
    for name, x in (("sink", sink), ("alibi", alibi)):
        if x is None:
            continue
        if tuple(x.shape) != (q.shape[1],) or not x.is_floating_point():
            raise AttentionError(
                f"{name} {tuple(x.shape)} of {x.dtype}: expected one float per query head, ({q.shape[1]},)"
            )
        if x.device != q.device:
            raise AttentionError(f"{name} on {x.device}, but the tensors are on {q.device}")
    if not 0 <= dropout_p < 1:
        raise AttentionError(f"dropout_p={dropout_p}: give the probability of dropping, 0 <= dropout_p < 1")
    if dropout_p and dropout_seed is None:
        raise AttentionError(
            f"dropout_p={dropout_p} without a seed: give dropout_seed, an int or a (B,) int64 tensor with one seed "
            "per row, equal on all ranks of a ring, so that the result does not depend on their number"
        )
    if isinstance(dropout_seed, torch.Tensor) and (
        tuple(dropout_seed.shape) != q.shape[:1] or dropout_seed.dtype != torch.int64
    ):
        raise AttentionError(
            f"dropout_seed {tuple(dropout_seed.shape)} of {dropout_seed.dtype}: expected int64 of shape (B,) = "
            f"{tuple(q.shape[:1])}, or an int"
        )


def resolve_seeds(q: torch.Tensor, dropout_p: float, seed: int | torch.Tensor | None) -> torch.Tensor | None:
    """Return seeds (B,) int64 on q's device, or None without dropout; an int gives each batch row a seed of its own."""
    if not dropout_p or seed is None:
        return None
    if isinstance(seed, torch.Tensor):
        return seed.to(q.device)
    return torch.arange(q.shape[0], device=q.device) * GOLDEN + wrapped(seed)


def wrapped(x: int) -> int:
    """Return the int64 with the lower 64 bits of x."""
    return (x + 2**63) % 2**64 - 2**63


def resolve_scale(scale: float | None, q: torch.Tensor) -> float:
    """Return the factor of q.k: any finite number, 0 and negative ones included; default 1 / sqrt(D)."""
    if scale is None:
        return 1.0 / math.sqrt(q.shape[-1])
    if not math.isfinite(scale):
        raise AttentionError(f"scale={scale}: give a finite number, or None for 1 / sqrt(D)")
    return float(scale)
