"""Checks of what users hand to an attention operator: shapes and dtypes only, so they cost nothing and never look at
data."""

from __future__ import annotations

import math

import torch

from longctx.errors import AttentionError


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """q (B, H, Tq, Dk), k (B, G, Tk, Dk), v (B, G, Tk, Dv), G dividing H, nothing empty, one floating dtype and
    device."""
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
    """(B, T) integers beside a (B, heads, T, D) tensor."""
    if ids is None:
        return
    expected = (like.shape[0], like.shape[2])
    if tuple(ids.shape) != expected or ids.is_floating_point() or ids.dtype == torch.bool or ids.is_complex():
        raise AttentionError(
            f"{name} {tuple(ids.shape)} of {ids.dtype}: expected integers of shape (B, T) = {expected}"
        )
    if ids.device != like.device:
        raise AttentionError(f"{name} on {ids.device}, but the tensors are on {like.device}")


def refuse_unbuilt(
    *, softcap: float | None, sink: torch.Tensor | None, alibi: torch.Tensor | None, dropout_p: float
) -> None:
    """Options that are named already and not built yet are refused, never ignored."""
    given = {"softcap": softcap, "sink": sink, "alibi": alibi, "dropout_p": dropout_p or None}
    for name, value in given.items():
        if value is not None:
            shown = value if isinstance(value, float | int) else "given"
            raise AttentionError(f"{name}={shown} is not supported in this version; leave it at its default")


def resolve_scale(scale: float | None, q: torch.Tensor) -> float:
    """The logits' factor: 1 / sqrt(D) unless given."""
    if scale is None:
        return 1.0 / math.sqrt(q.shape[-1])
    return float(scale)
