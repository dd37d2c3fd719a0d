"""ABC over the chunks of one block: forward, and backward from the same weights (docs/methods/abc.md "Backward").

Rows: the queries of the n = H / G heads that share a key head, already multiplied by the softmax scale, so keys and
weights are never expanded (and the caller multiplies dq by the scale). `visible` sets pairs to 0 where token t does not
read token j; w are the write weights (w_k of keys, w_v of values; see weights.py); K and V are the state before a chunk
times `carry`. Forward:

    a = visible(q k^T)        u = a w_k + q K^T        logits = read u        p = softmax(logits)        r = read p
    b = visible(r w_v^T)      out = b v + r V

Backward, with dK and dV the gradients of the state after the chunk:

    db = visible(dout v^T)    dp = read (db w_v + dout V^T)        dl = p (dp - rowsum(p dp))  du = read dl
    da = visible(du w_k^T)    dq = da k + du K                     dk = da^T q + w_k dK        dv = b^T dout + w_v dV
    dw_k = a^T du + k dK^T    dw_v = db^T r + v dV^T

`read` and `w` are quotients of masses. c_t = -dloss / dlog total_t (weights.py) is dl logits (keys) and p dp (values),
summed over a token's rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longctx.bounded import recurrence
from longctx.bounded.abc.weights import Normalizer, Weights
from longctx.bounded.chunks import ChunkMasks, times


@dataclass
class BlockState:
    """The state between blocks: keys (B, G, M, D) and values (B, G, M, Dv)."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass
class BlockGradient:
    """The gradient of a `BlockState`, and minus that of each control's log mass, (B, G, M, 1) each."""

    keys: torch.Tensor
    values: torch.Tensor
    minus_mass: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class BlockWeights:
    """The weights of keys and of values; values is None where both share one control (tied)."""

    keys: Weights
    values: Weights | None = None

    @property
    def tied(self) -> bool:
        return self.values is None

    @property
    def of_values(self) -> Weights:
        return self.keys if self.values is None else self.values


class BlockPass:
    """Forward or backward of one block, either alone; the constructor advances the state (`after`).

    Args:
        q: (B, G, chunks, n * C, D), times the scale. k: (B, G, chunks, C, D). v: (B, G, chunks, C, Dv). As all tensors
            here in the accumulator's dtype, fp32 or fp64.
        weights: (B, G, chunks, C, M) each.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        weights: BlockWeights,
        masks: ChunkMasks,
        before: BlockState,
    ) -> None:
        self.weights, self.w_k, self.w_v, self.masks = weights, weights.keys, weights.of_values, masks
        sizes = [k.shape[4], v.shape[4]]
        kv = torch.cat([k, v], -1)
        self.q, (self.k, self.v) = q, kv.split(sizes, -1)
        if weights.tied:  # one product for keys and values together
            both, after = self._advance(torch.cat([before.keys, before.values], -1), kv, self.w_k)
            self._K, self._V = both.split(sizes, -1)
            self.after = BlockState(*after.split(sizes, -1))
        else:
            self._K, keys = self._advance(before.keys, self.k, self.w_k)
            self._V, values = self._advance(before.values, self.v, self.w_v)
            self.after = BlockState(keys, values)

    def _advance(self, start: torch.Tensor, x: torch.Tensor, w: Weights) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the state times `carry` before each chunk, and the state after the block."""
        local = times(w.write, self.masks.after).transpose(-1, -2) @ x
        before, after = recurrence.forwards(start, local, w.carry, w.close, self.masks.kept)
        return (before if w.carry is None else before.mul_(w.carry.transpose(-1, -2))), after

    def _softmax(self) -> None:
        """Compute what forward and backward both need: a, logits, p, r and b."""
        w = self.w_k
        self.a = self.masks.mask_pairs(self.q @ self.k.transpose(-1, -2))
        self.logits = w.times_read_(self.masks.add_read(self.a @ w.write, self.q, self._K.transpose(-1, -2)))
        if w.seen is None:
            self.p = self.logits.softmax(-1)
        else:  # empty slots are masked; a row without any slot reads 0
            seen = w.seen[:, :, :, None].expand(*w.seen.shape[:3], self.q.shape[3] // w.seen.shape[3], -1, -1)
            masked = self.logits.masked_fill(~seen.flatten(3, 4), -torch.inf)
            self.p = masked.softmax(-1).nan_to_num_(0.0)
        self.r = self.w_v.times_read(self.p)
        self.b = self.masks.mask_pairs(self.r @ self.w_v.write.transpose(-1, -2))

    def forward(self) -> torch.Tensor:
        """Return out (B, G, chunks, n * C, Dv)."""
        self._softmax()
        return self.masks.add_read(self.b @ self.v, self.r, self._V)

    def backward(self, dout: torch.Tensor, gradient: BlockGradient) -> tuple[list[torch.Tensor], BlockGradient]:
        """Return [dq, dk, dv, ds of keys, ds of values], folded as the inputs, and the gradient of the state before.

        A shared control has one ds, which sums both.
        """
        self._softmax()
        masks, w_k, w_v = self.masks, self.w_k, self.w_v
        # Through out and the softmax, to the logits.
        db = masks.mask_pairs(dout @ self.v.transpose(-1, -2))
        dp = w_v.times_read_(masks.add_read(db @ w_v.write, dout, self._V.transpose(-1, -2)))
        pdp = dp.mul_(self.p)
        dl = torch.addcmul(pdp, self.p, pdp.sum(-1, keepdim=True), value=-1.0)
        du = w_k.times_read(dl)
        da = masks.mask_pairs(du @ w_k.write.transpose(-1, -2))
        dq = masks.add_read(da @ self.k, du, self._K)
        # Through the states: later chunks' reads arrive as dK and dV.
        dk_state, keys_before = self._advance_back(gradient.keys, du, self.q, w_k)
        dv_state, values_before = self._advance_back(gradient.values, self.r, dout, w_v)
        dk = masks.add_written(da.transpose(-1, -2) @ self.q, w_k.write, dk_state)
        dv = masks.add_written(self.b.transpose(-1, -2) @ dout, w_v.write, dv_state)
        # To the write weights, and from them to the control.
        dw_k = masks.add_written(self.a.transpose(-1, -2) @ du, self.k, dk_state.transpose(-1, -2))
        dw_v = masks.add_written(db.transpose(-1, -2) @ self.r, self.v, dv_state.transpose(-1, -2))
        c_k, c_v = self._per_token(dl.mul_(self.logits)), self._per_token(pdp)
        controls = [(w_k, dw_k, c_k), (w_v, dw_v, c_v)]
        if self.weights.tied:
            controls = [(w_k, dw_k.add_(dw_v), c_k.add_(c_v))]
        masses, ds = [], []
        for (w, dw, c), minus_mass in zip(controls, gradient.minus_mass, strict=True):
            found, before = self._control_gradient(w, dw, c, minus_mass)
            ds.append(found)
            masses.append(before)
        return [dq, dk, dv, *ds], BlockGradient(keys_before, values_before, tuple(masses))

    def _advance_back(
        self, gradient: torch.Tensor, rows: torch.Tensor, x: torch.Tensor, w: Weights
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient of what each chunk wrote, and of the state before the block.

        Args:
            rows, x: the state is read as rows @ state (of keys: x = q; of values: x = dout), (B, G, chunks, n * C, …).
        """
        local = self.masks.mask_rows(rows).transpose(-1, -2) @ x
        return recurrence.backwards(gradient, local, w.carry, w.close, self.masks.kept)

    def _per_token(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the n rows of a token: (B, G, chunks, C, M)."""
        size = self.k.shape[3]
        return x if x.shape[3] == size else x.unflatten(3, (-1, size)).sum(3)

    def _control_gradient(
        self, w: Weights, dw: torch.Tensor, c: torch.Tensor, minus_mass: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ds, from the gradient of the write weights, and minus the gradient of the log mass before."""
        if w.normalizer == Normalizer.SUM:
            return dw, minus_mass
        assert w.e is not None and w.inv_total is not None and w.d is not None
        running = w.normalizer == Normalizer.RUNNING
        # prefix: token t divides by total_t when it reads, which c measures. running: token j divides by total_j when
        # it writes w_j = e_j / total_j, so dw_j w_j takes the place of c.
        own = dw * w.write if running else dw
        c = (own if running else c) * w.inv_total
        # s_j is part of every total_t with t >= j: in this chunk by the masks, in later ones by the log mass.
        local = times(c, self.masks.before).sum(3, keepdim=True).transpose(-1, -2)
        later, before = recurrence.backwards(minus_mass, local, w.d, w.inv_end, self.masks.kept)
        total = self.masks.visible.transpose(-1, -2) @ c + times(later.transpose(-1, -2), self.masks.after)
        if running:
            return own - total.mul_(w.e), before
        return own.sub_(total).mul_(w.e), before
