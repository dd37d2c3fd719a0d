"""Exact attention of one query block with one key block, tile by tile, in plain PyTorch: the oracle and the fp64 path.

Forward is Rabe & Staats' lazy softmax: a running (out, lse) is continued over tiles of keys. Backward recomputes the
probabilities from the final lse, P = exp(S - lse), so nothing of size T x T is ever stored:

    dV += P^T dO      dP = dO V^T      dS = P * (dP - delta)      dQ += S' * dS K      dK += (S' * dS)^T Q

with delta = rowsum(dO * O) - dLSE: one number per row for the gradients of both the softmax and the lse. S' is the
derivative of a logit by q.k: scale, or with a cap scale * (1 - tanh^2). Dropout multiplies dP, and the P that
multiplies V, by keep / (1 - p); the lse is that before dropout. ALiBi adds -slope * |i - j| after the cap, so its
gradient is
-sum(dS * |i - j|).

Shapes: q, dq (B, H, Tq, Dk); k, dk (B, G, Tk, Dk); v, dv (B, G, Tk, Dv); out, dout (B, H, Tq, Dv); lse, delta (B, H,
    Tq); dalibi (H,). G divides H. Accumulators (out, lse, dq, dk, dv, dalibi) are fp32 or fp64 and are updated in
    place. `mask.tile(q0, q1, k0, k1)` returns False (nothing visible), True (everything) or a boolean tensor (B or 1,
    1, q1 - q0, k1 - k0).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from .dropout import kept


class Mask(Protocol):
    """Which keys of a tile each query sees, and the global indices of both: (Tq,) and (Tk,) int64."""

    @property
    def q_index(self) -> torch.Tensor: ...
    @property
    def k_index(self) -> torch.Tensor: ...
    def tile(self, q0: int, q1: int, k0: int, k1: int) -> bool | torch.Tensor: ...


class Scores(Protocol):
    """How a logit is computed from q.k, and how a probability is dropped: see longctx/attention/scores.py."""

    @property
    def scale(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...
    @property
    def alibi(self) -> torch.Tensor | None: ...
    @property
    def dropout_p(self) -> float: ...
    @property
    def seeds(self) -> torch.Tensor | None: ...


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    scores: Scores,
    out: torch.Tensor,
    lse: torch.Tensor,
    tile: int = 512,
) -> None:
    """Merge these keys into the running (out, lse), which is (0, -inf) before the first block."""
    for at in _tiles(q, k, mask, tile):
        logits, _ = at.logits(q[:, :, at.rows], k[:, :, at.cols], scores, out.dtype)
        old = lse[:, :, at.rows]
        m = torch.maximum(old, logits.amax(-1))
        m_safe = m.masked_fill(m == -torch.inf, 0.0)  # a row that has seen no key keeps (0, -inf)
        p = torch.exp(logits - m_safe[..., None])
        alpha = torch.exp(old - m_safe)
        l = (alpha + p.sum(-1)).masked_fill_(m == -torch.inf, 1.0)  # noqa: E741  # docs/methods/blockwise.md "Forward"
        block = _ungroup(_group(_drop(p, at.keep(p, scores)), k) @ v[:, :, None, at.cols].to(out.dtype))
        out[:, :, at.rows] = (out[:, :, at.rows] * alpha[..., None] + block) / l[..., None]
        lse[:, :, at.rows] = torch.where(m == -torch.inf, -torch.inf, m_safe + l.log())


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    mask: Mask,
    scores: Scores,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dalibi: torch.Tensor | None = None,
    tile: int = 512,
) -> None:
    """Add this block's part of the gradients to dq, dk, dv, dalibi; `lse` is final, over all blocks of keys."""
    for at in _tiles(q, k, mask, tile):
        rows = lse[:, :, at.rows, None]
        logits, slope = at.logits(q[:, :, at.rows], k[:, :, at.cols], scores, dq.dtype)
        p = torch.exp(logits - rows.masked_fill(rows == -torch.inf, torch.inf))  # a row without keys: exp(-inf) = 0
        do = _group(dout[:, :, at.rows].to(dq.dtype), k)
        keys, values = k[:, :, None, at.cols].to(dq.dtype), v[:, :, None, at.cols].to(dq.dtype)
        keep = at.keep(p, scores)
        ds = p * (_drop(_ungroup(do @ values.mT), keep) - delta[:, :, at.rows, None])
        if dalibi is not None:
            dalibi -= (ds * at.distance).sum((0, 2, 3))
        dqk = _group(ds * slope, k)
        dq[:, :, at.rows] += _ungroup(dqk @ keys)
        dk[:, :, at.cols] += (dqk.mT @ _group(q[:, :, at.rows].to(dq.dtype), k)).sum(2)
        dv[:, :, at.cols] += (_group(_drop(p, keep), k).mT @ do).sum(2)


class _Tile:
    """One tile of rows and columns, and its logits and dropout."""

    def __init__(self, rows: slice, cols: slice, mask: Mask, allowed: bool | torch.Tensor, q: torch.Tensor) -> None:
        self.rows, self.cols, self._mask, self._allowed, self._device = rows, cols, mask, allowed, q.device

    def logits(
        self, q: torch.Tensor, k: torch.Tensor, scores: Scores, dtype: torch.dtype
    ) -> tuple[torch.Tensor, float | torch.Tensor]:
        """Return (logits (B, H, rows, cols), -inf where hidden; their derivative by q.k)."""
        logits = _ungroup(_group(q.to(dtype), k) @ k[:, :, None].to(dtype).mT) * scores.scale
        slope: float | torch.Tensor = scores.scale
        if scores.softcap is not None:
            tanh_x = torch.tanh(logits / scores.softcap)
            logits, slope = tanh_x * scores.softcap, (1 - tanh_x.square()) * scores.scale
        if scores.alibi is not None:
            logits = logits - scores.alibi.to(dtype)[:, None, None] * self.distance
        if isinstance(self._allowed, torch.Tensor):
            logits = logits.masked_fill(~self._allowed.to(q.device), -torch.inf)
        return logits, slope

    @property
    def distance(self) -> torch.Tensor:
        """(rows, cols) int64, |i - j| of global indices."""
        queries, keys = self._indices()
        return (queries[:, None] - keys).abs()

    def keep(self, p: torch.Tensor, scores: Scores) -> torch.Tensor | None:
        """Return dropout's factor of p (B, H, rows, cols), 0 or 1 / (1 - dropout_p); None without dropout."""
        if not scores.dropout_p:
            return None
        assert scores.seeds is not None
        stay = kept(scores.seeds, p.shape[1], *self._indices(), scores.dropout_p)
        return stay.to(p.dtype).div_(1 - scores.dropout_p)

    def _indices(self) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = self._mask.q_index[self.rows], self._mask.k_index[self.cols]
        return q.to(self._device), k.to(self._device)


def _tiles(q: torch.Tensor, k: torch.Tensor, mask: Mask, tile: int) -> Iterator[_Tile]:
    rows, cols = q.shape[2], k.shape[2]
    for q0 in range(0, rows, tile):
        for k0 in range(0, cols, tile):
            q1, k1 = min(rows, q0 + tile), min(cols, k0 + tile)
            allowed = mask.tile(q0, q1, k0, k1)
            if allowed is not False:
                yield _Tile(slice(q0, q1), slice(k0, k1), mask, allowed, q)


def _drop(p: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    return p if keep is None else p * keep


def _group(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return (B, H, …) as (B, G, H / G, …), grouping the query heads that share a key head."""
    return x.unflatten(1, (k.shape[1], -1))


def _ungroup(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1, 2)
