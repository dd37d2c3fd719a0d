"""Many queries, one shared key that is also the value: the arithmetic of EL, MLA and multi-query decoding.

Every head (and every beam) of a token reads the same (S, C) tensor, so one pass over it serves them all. Keys come in
tiles with a running maximum, sum and numerator, in fp32 (fp64 for fp64), so nothing of queries x S is ever whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from longctx.errors import AttentionError

TILE = 8192
"""Keys of a tile: 64 queries' logits in fp32 are then 2 MiB, which stay in a core's cache."""

Edit = Callable[[torch.Tensor, int, int], torch.Tensor]


class SharedResult(NamedTuple):
    """What `shared_attention` returns."""

    context: torch.Tensor
    """(B, H, T, Cv) fp32 or fp64: the mean of the shared rows under each query's probabilities."""
    lse: torch.Tensor
    """(B, H, T): logarithm of the softmax's denominator, sink included; -inf where nothing was visible."""
    mass: torch.Tensor
    """(B, H, T): the sum of the probabilities that met a value. 1, but less beside a sink, 0 without a visible key,
    and anything around 1 under dropout. A value bias is multiplied by it."""


def shared_attention(
    q: torch.Tensor,
    shared: torch.Tensor,
    *,
    value_width: int | None = None,
    edit: Edit | None = None,
    keep: Edit | None = None,
    sink: torch.Tensor | None = None,
    tile: int = TILE,
) -> SharedResult:
    """softmax(q shared^T) shared, tile by tile.

    Args:
        q: (B, H, T, C), scaled; H counts heads, or beams x heads.
        shared: (B, S, C), keys; its first `value_width` columns are the values (default: all C).
        edit: (logits (B, H, T, n) of keys start..stop, start, stop) -> logits, -inf where hidden.
        keep: (probabilities, start, stop) -> what meets the values (dropout); the denominator does not see it.
        sink: (H,) one more logit per head, without a value.
        tile: keys at a time.

    Raises:
        AttentionError: shapes, dtypes or devices do not fit.
    """
    _check(q, shared, value_width, sink)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, tokens, width = q.shape
    values = shared.shape[2] if value_width is None else value_width
    rows = q.reshape(batch, heads * tokens, width)
    top = torch.full((batch, heads, tokens), -torch.inf, dtype=dtype, device=q.device)
    total = torch.zeros_like(top)
    if sink is not None:
        top, total = sink.to(dtype)[None, :, None].expand_as(top), torch.ones_like(top)
    mass, numerator = torch.zeros_like(total), q.new_zeros(batch, heads, tokens, values, dtype=dtype)
    for start in range(0, shared.shape[1], tile):
        block = shared[:, start : start + tile]
        stop = start + block.shape[1]
        logits = _product(rows, block.mT, dtype).view(batch, heads, tokens, -1)
        if edit is not None:
            logits = edit(logits, start, stop)
        new_top = torch.maximum(top, logits.amax(-1).detach())
        safe = new_top.masked_fill(new_top == -torch.inf, 0.0)  # no visible key yet: exp(-inf - 0) = 0, not NaN
        p, carried = torch.exp(logits - safe[..., None]), torch.exp(top - safe)
        total = total * carried + p.sum(-1)
        met = p if keep is None else keep(p, start, stop)
        mass = mass * carried + met.sum(-1)
        read = _product(met.reshape(batch, heads * tokens, -1).to(shared.dtype), block[..., :values], dtype)
        numerator = numerator * carried[..., None] + read.view(batch, heads, tokens, values)
        top = new_top
    empty = total == 0
    divisor = total.masked_fill(empty, 1.0)
    lse = torch.where(empty, -torch.inf, top.masked_fill(empty, 0.0) + divisor.log())
    return SharedResult(numerator / divisor[..., None], lse, mass / divisor)


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, N, K) x (B, K, M) with sums in ``dtype``: where a GPU accumulates half precision in fp32 it is not copied."""
    if a.dtype == dtype or a.device.type == "cpu":
        return a.to(dtype) @ b.to(dtype)
    return torch.bmm(a, b, out_dtype=dtype)


def _check(q: torch.Tensor, shared: torch.Tensor, value_width: int | None, sink: torch.Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, shared {tuple(shared.shape)}"
    if q.dim() != 4 or shared.dim() != 3 or q.shape[0] != shared.shape[0] or q.shape[3] != shared.shape[2]:
        raise AttentionError(f"{shapes}: expected q (B, H, T, C) and shared (B, S, C)")
    if q.dtype != shared.dtype or q.device != shared.device:
        raise AttentionError(
            f"q {q.dtype} on {q.device}, shared {shared.dtype} on {shared.device}: give one dtype and one device"
        )
    if value_width is not None and not 0 < value_width <= shared.shape[2]:
        raise AttentionError(f"value_width={value_width}: values are columns of shared, 1 to {shared.shape[2]}")
    if sink is not None and tuple(sink.shape) != (q.shape[1],):
        raise AttentionError(f"sink {tuple(sink.shape)}: expected one logit per head, ({q.shape[1]},)")
