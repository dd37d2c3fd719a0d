"""Attention of many queries to one tensor that is both keys and values: EL, MLA and multi-query decoding.

All heads and beams of a token read the same (S, C) tensor, so one pass over it serves them all. An online softmax over
tiles of keys keeps a running maximum, sum and numerator in fp32 (fp64 for fp64), so no tensor of queries x S is
allocated. Equations: docs/methods/blockwise.md "Forward", docs/methods/el.md "Decode step".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from longctx.errors import AttentionError

TILE = 8192
"""Keys per tile: the fp32 logits of 64 queries then take 2 MiB, which fit in a core's cache."""

Edit = Callable[[torch.Tensor, int, int], torch.Tensor]
"""(logits or probabilities of keys start..stop, start, stop) -> the same, modified."""


class SharedResult(NamedTuple):
    """The result of `shared_attention`."""

    context: torch.Tensor
    """c (B, H, T, Cv) fp32 or fp64: the mean of the shared rows, weighted by each query's probabilities."""
    lse: torch.Tensor
    """(B, H, T): logarithm of the softmax's denominator, sink included; -inf where no key is visible."""
    mass: torch.Tensor
    """mu (B, H, T): the sum of the weights of the values, which multiplies a value bias. 1; less with a sink, 0 without
    a visible key, about 1 with dropout."""


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
    """Compute softmax(q shared^T) shared, tile by tile.

    Args:
        q: (B, H, T, C), scaled; H is the number of heads, or beams x heads.
        shared: (B, S, C), the keys; the first `value_width` columns are the values (default: all C).
        edit: maps the products (B, H, T, n) of a tile to logits, -inf where hidden; default: products are logits.
        keep: maps a tile's probabilities to the weights of the values (dropout); the denominator ignores it.
        sink: (H,) an additional logit per head, without a value.
        tile: keys per tile.

    Raises:
        AttentionError: shapes, dtypes or devices do not fit.
    """
    _check(q, shared, value_width, sink)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, tokens, width = q.shape
    values = shared.shape[2] if value_width is None else value_width
    rows = q.reshape(batch, heads * tokens, width)
    # The running state (m, w, mu, numerator); a sink is a first key without a value.
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
        new_top = torch.maximum(top, logits.amax(-1).detach())  # its gradient cancels
        base = new_top.masked_fill(new_top == -torch.inf, 0.0)  # no visible key yet: exp(-inf - 0) = 0, not NaN
        p, fade = torch.exp(logits - base[..., None]), torch.exp(top - base)
        total = total * fade + p.sum(-1)
        weights = p if keep is None else keep(p, start, stop)
        mass = mass * fade + weights.sum(-1)
        product = _product(weights.reshape(batch, heads * tokens, -1).to(shared.dtype), block[..., :values], dtype)
        numerator = numerator * fade[..., None] + product.view(batch, heads, tokens, values)
        top = new_top
    # Normalise; a row that has seen no key gets (0, -inf) and mass 0.
    empty = total == 0
    divisor = total.masked_fill(empty, 1.0)
    lse = torch.where(empty, -torch.inf, top.masked_fill(empty, 0.0) + divisor.log())
    return SharedResult(numerator / divisor[..., None], lse, mass / divisor)


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return (B, N, K) x (B, K, M) with sums in ``dtype``; on a GPU without copying half-precision inputs to fp32."""
    if a.dtype == dtype or a.device.type == "cpu":
        return a.to(dtype) @ b.to(dtype)
    return torch.bmm(a, b, out_dtype=dtype)


def _check(q: torch.Tensor, shared: torch.Tensor, value_width: int | None, sink: torch.Tensor | None) -> None:
    """Raise AttentionError if shapes, dtypes or devices do not fit."""
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
