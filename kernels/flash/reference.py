"""Exact attention of one query block with one key block, tile by tile, in plain PyTorch: the oracle and the fp64 path.

Forward is Rabe & Staats' lazy softmax: a running (out, lse) is continued over tiles of keys. Backward recomputes the
probabilities from the final lse, P = exp(S - lse), so nothing of size T x T is ever stored:

    dV += P^T dO      dP = dO V^T      dS = P * (dP - delta)      dQ += scale * dS K      dK += scale * dS^T Q

with delta = rowsum(dO * O) - dLSE: one number a row holds all that the softmax's and the lse's gradients need.

Shapes: q, dq (B, H, Tq, Dk); k, dk (B, G, Tk, Dk); v, dv (B, G, Tk, Dv); out, dout (B, H, Tq, Dv); lse, delta (B, H,
    Tq). G divides H. Accumulators (out, lse, dq, dk, dv) are fp32 or fp64 and are updated in place. `mask.tile(q0,
    q1, k0, k1)` returns False (nothing visible), True (everything) or a boolean tensor (B or 1, 1, q1 - q0, k1 - k0).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch


class Mask(Protocol):
    """Which keys of a tile each query sees."""

    def tile(self, q0: int, q1: int, k0: int, k1: int) -> bool | torch.Tensor: ...


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    tile: int = 512,
) -> None:
    """Continue the running (out, lse) with these keys; before the first block they are (0, -inf)."""
    for q0, q1, k0, k1, allowed in _tiles(q.shape[2], k.shape[2], mask, tile):
        scores = _scores(q[:, :, q0:q1], k[:, :, k0:k1], allowed, scale, out.dtype)
        old, top = lse[:, :, q0:q1], scores.amax(-1)
        new_top = torch.maximum(old, top)
        safe = new_top.masked_fill(new_top == -torch.inf, 0.0)  # a row that has seen no key yet keeps (0, -inf)
        p = torch.exp(scores - safe[..., None])
        kept, total = torch.exp(old - safe), p.sum(-1)
        weight = (kept + total).masked_fill_(new_top == -torch.inf, 1.0)
        block = _ungroup(_group(p, k) @ v[:, :, None, k0:k1].to(out.dtype))
        out[:, :, q0:q1] = (out[:, :, q0:q1] * kept[..., None] + block) / weight[..., None]
        lse[:, :, q0:q1] = torch.where(new_top == -torch.inf, -torch.inf, safe + weight.log())


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    mask: Mask,
    scale: float,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    tile: int = 512,
) -> None:
    """Add this block's part of the gradients to dq, dk, dv; `lse` is final, over all blocks of keys."""
    for q0, q1, k0, k1, allowed in _tiles(q.shape[2], k.shape[2], mask, tile):
        rows = lse[:, :, q0:q1, None]
        scores = _scores(q[:, :, q0:q1], k[:, :, k0:k1], allowed, scale, dq.dtype)
        p = torch.exp(scores - rows.masked_fill(rows == -torch.inf, torch.inf))  # a row without keys: exp(-inf) = 0
        p, do = _group(p, k), _group(dout[:, :, q0:q1].to(dq.dtype), k)
        keys, values = k[:, :, None, k0:k1].to(dq.dtype), v[:, :, None, k0:k1].to(dq.dtype)
        ds = p * (do @ values.mT - _group(delta[:, :, q0:q1, None], k)) * scale
        dq[:, :, q0:q1] += _ungroup(ds @ keys)
        dk[:, :, k0:k1] += (ds.mT @ _group(q[:, :, q0:q1].to(dq.dtype), k)).sum(2)
        dv[:, :, k0:k1] += (p.mT @ do).sum(2)


def _tiles(rows: int, cols: int, mask: Mask, tile: int) -> Iterator[tuple[int, int, int, int, bool | torch.Tensor]]:
    for q0 in range(0, rows, tile):
        for k0 in range(0, cols, tile):
            q1, k1 = min(rows, q0 + tile), min(cols, k0 + tile)
            allowed = mask.tile(q0, q1, k0, k1)
            if allowed is not False:
                yield q0, q1, k0, k1, allowed


def _scores(
    q: torch.Tensor, k: torch.Tensor, allowed: bool | torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    scores = _ungroup(_group(q.to(dtype), k) @ k[:, :, None].to(dtype).mT) * scale
    if isinstance(allowed, torch.Tensor):
        scores = scores.masked_fill(~allowed.to(q.device), -torch.inf)
    return scores


def _group(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(B, H, …) -> (B, G, H / G, …): the query heads that share a key head side by side."""
    return x.unflatten(1, (k.shape[1], -1))


def _ungroup(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1, 2)
