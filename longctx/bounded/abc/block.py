"""ABC over the chunks of one block: forward, and backward from the same weights (docs/methods/abc.md
"Chunked form", "Backward").

Rows are the queries of a group times the scale, n = H / G a token, so that keys and weights are never expanded. With
A = Q K^T over the pairs that may meet, W the write weights and K0, V0 the memory before the chunk (`carry` times it:
K', V'),

    logits = read (A W + Q K'^T)            P = softmax(logits)      P' = read P      O = (P' W^T) V + P' V'
    dP = read (dO V'^T + (dO V^T) W)        dL = P (dP - rowsum(P dP))                G = read dL
    dQ = (G W^T) K + G K'      dK = (G W^T)^T Q + W U      dV = (P' W^T)^T dO + W U
    dW = A^T G + K U^T + (dO V^T)^T P' + V U^T

where U is the gradient of the memory after the chunk. Weights are quotients of masses, see weights.py: c holds, a token
and slot, by how much the loss falls as the mass grows that the token divided by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longctx.bounded import memory
from longctx.bounded.abc.weights import Weights
from longctx.bounded.chunks import Sight, times


@dataclass
class Memory:
    """The state between blocks: keys (B, G, M, D), values (B, G, M, Dv); or its gradient, with that of the log mass of
    both streams, (B, G, M, 1), negative."""

    keys: torch.Tensor
    values: torch.Tensor
    mass: tuple[torch.Tensor, ...] = ()


class Pass:
    """One block: q (B, G, chunks, n * C, D) times the scale, k (B, G, chunks, C, D), v, in the accumulator's dtype.

    weights: of keys and of values; one object twice where they share a control.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        weights: tuple[Weights, Weights],
        sight: Sight,
        before: Memory,
    ) -> None:
        sizes = [k.shape[4], v.shape[4]]
        both = torch.cat([k, v], -1)
        self.q, self.sight, (self.k, self.v) = q, sight, both.split(sizes, -1)
        self.for_keys, self.for_values = weights
        if self.for_keys is self.for_values:
            met, after = self._remember(torch.cat([before.keys, before.values], -1), both, self.for_keys)
            self._keys, self._values = met.split(sizes, -1)
            self.after = Memory(*after.split(sizes, -1))
        else:
            self._keys, keys = self._remember(before.keys, self.k, self.for_keys)
            self._values, values = self._remember(before.values, self.v, self.for_values)
            self.after = Memory(keys, values)

    def _remember(self, start: torch.Tensor, x: torch.Tensor, w: Weights) -> tuple[torch.Tensor, torch.Tensor]:
        """The memory times `carry` before each chunk, and the memory after the block."""
        local = times(w.write, self.sight.after).transpose(-1, -2) @ x
        before, after = memory.forwards(start, local, w.carry, w.close, self.sight.kept)
        return (before if w.carry is None else before.mul_(w.carry.transpose(-1, -2))), after

    def probabilities(self) -> None:
        """Compute what both directions need: the pairs' scores, the slots' logits, and their softmax."""
        w = self.for_keys
        self.scores = self.sight.pairs(self.q @ self.k.transpose(-1, -2))
        self.logits = w.scale(self.sight.add_read(self.scores @ w.write, self.q, self._keys.transpose(-1, -2)))
        if w.seen is None:
            self.p = self.logits.softmax(-1)
        else:
            seen = w.seen[:, :, :, None].expand(*w.seen.shape[:3], self.q.shape[3] // w.seen.shape[3], -1, -1)
            masked = self.logits.masked_fill(~seen.flatten(3, 4), -torch.inf)
            self.p = masked.softmax(-1).nan_to_num_(0.0)
        self.spread = self.for_values.scaled(self.p)
        self.mixed = self.sight.pairs(self.spread @ self.for_values.write.transpose(-1, -2))

    def forward(self) -> torch.Tensor:
        """(B, G, chunks, n * C, Dv)."""
        self.probabilities()
        return self.sight.add_read(self.mixed @ self.v, self.spread, self._values)

    def backward(self, dout: torch.Tensor, gradient: Memory) -> tuple[list[torch.Tensor], Memory]:
        """([dq, dk, dv, ds of keys, ds of values], folded as the inputs; the gradient of the memory before the block).

        Where both share a control its gradient is the last one's sum with the first.
        """
        self.probabilities()
        sight, keys, values = self.sight, self.for_keys, self.for_values
        pairs = sight.pairs(dout @ self.v.transpose(-1, -2))
        dp = values.scale(sight.add_read(pairs @ values.write, dout, self._values.transpose(-1, -2)))
        pdp = dp.mul_(self.p)
        dlogits = torch.addcmul(pdp, self.p, pdp.sum(-1, keepdim=True), value=-1.0)
        g = keys.scaled(dlogits)
        mixed = sight.pairs(g @ keys.write.transpose(-1, -2))
        dq = sight.add_read(mixed @ self.k, g, self._keys)
        inside_k, dkeys = self._recall(gradient.keys, g, self.q, keys)
        inside_v, dvalues = self._recall(gradient.values, self.spread, dout, values)
        dk = sight.add_written(mixed.transpose(-1, -2) @ self.q, keys.write, inside_k)
        dv = sight.add_written(self.mixed.transpose(-1, -2) @ dout, values.write, inside_v)
        raw_k = sight.add_written(self.scores.transpose(-1, -2) @ g, self.k, inside_k.transpose(-1, -2))
        raw_v = sight.add_written(pairs.transpose(-1, -2) @ self.spread, self.v, inside_v.transpose(-1, -2))
        c_k, c_v = self._per_token(dlogits.mul_(self.logits)), self._per_token(pdp)
        streams = [(keys, raw_k, c_k), (values, raw_v, c_v)]
        if keys is values:
            streams = [(keys, raw_k.add_(raw_v), c_k.add_(c_v))]
        masses, ds = [], []
        for (w, raw, c), mass in zip(streams, gradient.mass, strict=True):
            found, before = self._control(w, raw, c, mass)
            ds.append(found)
            masses.append(before)
        return [dq, dk, dv, *ds], Memory(dkeys, dvalues, tuple(masses))

    def _recall(
        self, gradient: torch.Tensor, g: torch.Tensor, x: torch.Tensor, w: Weights
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return memory.backwards(gradient, self.sight.rows(g).transpose(-1, -2) @ x, w.carry, w.close, self.sight.kept)

    def _per_token(self, x: torch.Tensor) -> torch.Tensor:
        """Summed over the n rows of a token: (B, G, chunks, C, M)."""
        size = self.k.shape[3]
        return x if x.shape[3] == size else x.unflatten(3, (-1, size)).sum(3)

    def _control(
        self, w: Weights, raw: torch.Tensor, c: torch.Tensor, mass: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The control's gradient from that of the write weights, and the (negative) one of the log mass before."""
        if w.e is None or w.over is None or w.d is None:
            return raw, mass
        sight, own = self.sight, raw
        if w.write is not w.e:  # running: a token divides when it writes, not when it is read
            own = raw * w.write
            c = own
        c = c * w.over
        local = times(c, sight.before).sum(3, keepdim=True).transpose(-1, -2)
        inside, before = memory.backwards(mass, local, w.d, w.shut, sight.kept)
        total = sight.visible.transpose(-1, -2) @ c + times(inside.transpose(-1, -2), sight.after)
        if w.write is w.e:
            return raw.sub_(total).mul_(w.e), before
        return own - total.mul_(w.e), before
