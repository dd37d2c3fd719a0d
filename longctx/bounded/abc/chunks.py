"""ABC over a local sequence by chunks, with its own backward: the training form.

Forward keeps the inputs and the state at the start of each block, nothing else that grows; backward walks the blocks
from the last to the first and computes each again.
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.attention.backends.base import accumulator_dtype
from longctx.bounded.abc import weights
from longctx.bounded.abc.block import Memory, Pass
from longctx.bounded.chunks import Block, Runs, Sight, blocks, causal_sight, fold, unfold
from longctx.derivative import first_only

CHUNK = 64
BLOCK_ROWS = 4096
"""Rows of queries, over batch and heads, that are computed together."""

Optional = torch.Tensor | None


@first_only
class Chunked(torch.autograd.Function):
    """(q, k, v, key and value control, state before) -> (out, state after); see `abc_attention` for the shapes.

    A state is (key log mass, value log mass, keys, values). The value control and log mass are None where both share
    one. `ids` (B, T) and `document` (B,) as in `Runs`, or None for one document.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        s_k: torch.Tensor,
        s_v: Optional,
        z_k: torch.Tensor,
        z_v: Optional,
        keys: torch.Tensor,
        values: torch.Tensor,
        ids: Optional,
        document: Optional,
        normalizer: str,
        scale: float,
        chunk: int,
    ) -> tuple[Optional, ...]:
        walk = _Walk(q, k, v, s_k, s_v, ids, document, normalizer, scale)
        out = q.new_empty((*q.shape[:3], v.shape[3]))
        state = (z_k, z_v, keys, values)
        ctx.steps = []
        rows = max(q.shape[0] * q.shape[1] * chunk, 1)
        for block in blocks(q.shape[2], chunk, max(BLOCK_ROWS // rows, 1)):
            state = walk.forward(block, state, out, ctx.steps)
        ctx.set_materialize_grads(False)
        ctx.walk_settings = (normalizer, scale)
        ctx.save_for_backward(q, k, v, s_k, s_v, ids, document, z_k, z_v, keys, values, *state[2:])
        # An output must not be an input: a state that nothing was added to is a copy.
        return (out, *(None if x is None else x.clone() for x in state))

    @staticmethod
    def backward(ctx: Any, dout: Optional, dz_k: Optional, dz_v: Optional, dkeys: Optional, dvalues: Optional) -> Any:
        q, k, v, s_k, s_v, ids, document, z_k, z_v, keys, values, last_keys, last_values = ctx.saved_tensors
        walk = _Walk(q, k, v, s_k, s_v, ids, document, *ctx.walk_settings)
        dkeys = torch.zeros_like(keys) if dkeys is None else dkeys
        dvalues = torch.zeros_like(values) if dvalues is None else dvalues
        gradient = Memory(dkeys, dvalues, walk.mass_gradient(dz_k, dz_v, dkeys, dvalues, last_keys, last_values))
        if dout is None:
            dout = q.new_zeros((*q.shape[:3], v.shape[3]))
        grads = [torch.empty_like(x) for x in (q, k, v, s_k, s_v) if x is not None]
        for block, state in reversed(ctx.steps):
            gradient = walk.backward(block, state, dout, gradient, grads)
        dz = walk.initial_mass_gradient(gradient, keys, values)
        ds_v, dz_v = (grads[4], dz[1]) if s_v is not None else (None, None)
        return *grads[:4], ds_v, dz[0], dz_v, gradient.keys, gradient.values, None, None, None, None, None


class _Walk:
    """The blocks of one call, in either direction."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        s_k: torch.Tensor,
        s_v: Optional,
        ids: Optional,
        document: Optional,
        normalizer: str,
        scale: float,
    ) -> None:
        self.q, self.k, self.v, self.controls = q, k, v, [s_k] if s_v is None else [s_k, s_v]
        self.runs = None if ids is None else Runs(ids, document)
        self.normalizer, self.scale, self.dtype = normalizer, scale, accumulator_dtype(q.dtype)
        self._sights: dict[int, Sight] = {}

    def forward(self, block: Block, state: Any, out: torch.Tensor, steps: list[Any]) -> Any:
        """One block, or the parts of it that fit; returns the state after it and notes each part with its start."""
        made = self._pass(block, state)
        if made is None:
            for half in block.halves():
                state = self.forward(half, state, out, steps)
            return state
        steps.append((block, state))
        unfold(out, block, made.forward())
        mass_v = made.for_values.mass if len(self.controls) > 1 else None
        return made.for_keys.mass, mass_v, made.after.keys, made.after.values

    def backward(
        self, block: Block, state: Any, dout: torch.Tensor, gradient: Memory, grads: list[torch.Tensor]
    ) -> Memory:
        made = self._pass(block, state)
        assert made is not None
        parts, gradient = made.backward(fold(dout, block, self.k.shape[1], self.dtype).contiguous(), gradient)
        parts[0].mul_(self.scale)
        for whole, part in zip(grads, parts, strict=True):
            unfold(whole, block, part)
        return gradient

    def _pass(self, block: Block, state: Any) -> Pass | None:
        z_k, z_v, keys, values = state
        sight, group = self._sight(block), self.k.shape[1]
        made = []
        for control, mass in zip(self.controls, (z_k, z_v), strict=False):
            found = weights.make(fold(control, block, group, self.dtype), mass, sight, self.normalizer)
            if found is None:
                return None
            made.append(found)
        q, k, v = (fold(x, block, group, self.dtype) for x in (self.q, self.k, self.v))
        if sight.valid is not None:  # what padding holds is nobody's business, NaN included
            k, v = (x.masked_fill(~sight.valid, 0.0) for x in (k, v))
            q = q.unflatten(3, (-1, block.size)).masked_fill(~sight.valid[:, :, :, None], 0.0).flatten(3, 4)
        return Pass(q * self.scale, k, v, (made[0], made[-1]), sight, Memory(keys, values))

    def _sight(self, block: Block) -> Sight:
        if self.runs is not None:
            return self.runs.sight(block, self.dtype)
        if block.size not in self._sights:
            self._sights[block.size] = causal_sight(block.size, self.dtype, self.q.device)
        return self._sights[block.size]

    def mass_gradient(
        self,
        dz_k: Optional,
        dz_v: Optional,
        dkeys: torch.Tensor,
        dvalues: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """By how much the loss falls as the final log masses grow, a control each: (B, G, M, 1)."""
        falls = [torch.zeros_like(keys[..., :1])] * 2
        if self.normalizer == "prefix":  # a memory is a mean: it is divided by the mass
            falls = [(d * x).sum(-1, keepdim=True) for d, x in ((dkeys, keys), (dvalues, values))]
        if len(self.controls) == 1:
            falls = [falls[0] + falls[1]]
        return tuple(
            fall if dz is None else fall - dz[..., None] for fall, dz in zip(falls, (dz_k, dz_v), strict=False)
        )

    def initial_mass_gradient(self, gradient: Memory, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        """The gradient of the log mass before the first token, a control each: the memory is one more token there."""
        if self.normalizer == "sum":
            return [torch.zeros_like(keys[..., 0])] * 2
        gains = [torch.zeros_like(keys[..., 0])] * 2
        if self.normalizer == "prefix":
            gains = [(gradient.keys * keys).sum(-1), (gradient.values * values).sum(-1)]
        if len(self.controls) == 1:
            gains = [gains[0] + gains[1]]
        return [gain - mass[..., 0] for gain, mass in zip(gains, gradient.mass, strict=True)]
