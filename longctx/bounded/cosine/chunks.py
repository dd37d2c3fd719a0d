"""Causal cosine attention over a local sequence by chunks, with its own backward (docs/methods/cottention.md).

Inside a chunk (Q K^T over visible pairs) V, between chunks Q S with the state S, in fp32 (fp64 for fp64 inputs).
Backward is the same product three times, with S and with the gradient of S that comes from the chunks behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from longctx.attention.backends.base import accumulator_dtype
from longctx.bounded import memory
from longctx.bounded.chunks import Block, Runs, Sight, blocks, causal_sight, fold, times, unfold
from longctx.kernels.cosine.reference import EPSILON

CHUNK = 64
BLOCK_ROWS = 4096
"""Rows of queries, over batch and heads, that are computed together."""

Optional = torch.Tensor | None


@torch.library.custom_op("longctx::cosine_chunks", mutates_args=())
def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    size: torch.Tensor,
    state: torch.Tensor,
    ids: Optional,
    document: Optional,
    on_query: bool,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, S after, S before each block, which backward goes on from and which has no gradient).

    q (B, H, T, D), k (B, G, T, D) need not be normalised, v (B, G, T, Dv). size = n^-a: (B, G, T) multiplies the
    values, (B, H, T) the outputs, as `on_query` says. S (B, G, D, Dv). `ids` (B, T) and `document` (B,) as in `Runs`,
    or None for one document.
    """
    walk = _Walk(q, k, v, size, ids, document, on_query)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    starts = []
    for block in _blocks(q, chunk):
        starts.append(state)
        state = walk.forward(block, state, out)
    return out, state.clone(), torch.stack(starts)


@chunked.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: torch.Tensor, state: torch.Tensor, *settings: Any
) -> Any:
    rows, chunk = max(q.shape[0] * q.shape[1] * settings[-1], 1), settings[-1]
    count, whole = max(BLOCK_ROWS // rows, 1), q.shape[2] // chunk
    blocks = -(-whole // count) + -(-(q.shape[2] - whole * chunk) // chunk)
    return q.new_empty((*q.shape[:3], v.shape[3])), torch.empty_like(state), state.new_empty((blocks, *state.shape))


@torch.library.custom_op("longctx::cosine_chunks_backward", mutates_args=())
def chunked_backward(
    dout: torch.Tensor,
    dstate: torch.Tensor,
    starts: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    size: torch.Tensor,
    ids: Optional,
    document: Optional,
    on_query: bool,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k, v, size and of the state before."""
    walk = _Walk(q, k, v, size, ids, document, on_query)
    gradient = dstate.clone()
    dq, dk, dv, dsize = grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, size)]
    for block, state in reversed(list(zip(_blocks(q, chunk), starts, strict=True))):
        gradient = walk.backward(block, state, dout, gradient, grads)
    return dq, dk, dv, dsize, gradient


@chunked_backward.register_fake
def _(dout: torch.Tensor, dstate: torch.Tensor, starts: torch.Tensor, *inputs: Any) -> Any:
    return (*(x.new_empty(x.shape) for x in inputs[:4]), torch.empty_like(dstate))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.on_query, ctx.chunk = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], *tensors[:4], *tensors[5:])


def _differentiate(ctx: Any, dout: Optional, dstate: Optional, _: Any) -> Any:
    starts, q, k, v, size, ids, document = ctx.saved_tensors
    dout = q.new_zeros((*q.shape[:3], v.shape[3])) if dout is None else dout
    dstate = starts.new_zeros(starts.shape[1:]) if dstate is None else dstate
    grads = chunked_backward(dout, dstate, starts, q, k, v, size, ids, document, ctx.on_query, ctx.chunk)
    return *grads, None, None, None, None


chunked.register_autograd(_differentiate, setup_context=_save)


def _blocks(q: torch.Tensor, chunk: int) -> Iterator[Block]:
    rows = max(q.shape[0] * q.shape[1] * chunk, 1)
    return blocks(q.shape[2], chunk, max(BLOCK_ROWS // rows, 1))


class _Walk:
    """The blocks of one call, in either direction."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        size: torch.Tensor,
        ids: Optional,
        document: Optional,
        on_query: bool,
    ) -> None:
        self.q, self.k, self.v, self.size, self.on_query = q, k, v, size[..., None], on_query
        self.group, self.dtype = k.shape[1], accumulator_dtype(q.dtype)
        self.runs = None if ids is None else Runs(ids, document)
        self._sights: dict[int, Sight] = {}

    def forward(self, block: Block, state: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        sight = self._sight(block)
        (q, _), (k, _), v, size = self._inputs(block, sight)
        scaled = v.contiguous() if self.on_query else v * size
        before, state = self._remember(k, scaled, state, sight)
        part = self._read(q, k, scaled, before, sight)
        unfold(out, block, part.mul_(size) if self.on_query else part)
        return state

    def backward(
        self, block: Block, state: torch.Tensor, dout: torch.Tensor, gradient: torch.Tensor, grads: list[torch.Tensor]
    ) -> torch.Tensor:
        sight = self._sight(block)
        (q, q_norm), (k, k_norm), v, size = self._inputs(block, sight)
        scaled = v.contiguous() if self.on_query else v * size
        before, _ = self._remember(k, scaled, state, sight)
        dout = fold(dout, block, self.group, self.dtype).contiguous()
        dsize = None
        if self.on_query:
            dsize = (dout * self._read(q, k, scaled, before, sight)).sum(-1, keepdim=True)
            dout = dout * size
        pairs = sight.pairs(dout @ scaled.transpose(-1, -2))
        dq = sight.add_read(pairs @ k, dout, before.transpose(-1, -2))
        local = sight.rows(q).transpose(-1, -2) @ dout
        inside, gradient = memory.backwards(gradient, local, None, None, sight.kept)
        dk = sight.add_written(pairs.transpose(-1, -2) @ q, scaled, inside.transpose(-1, -2))
        scores = sight.pairs(q @ k.transpose(-1, -2))
        dscaled = sight.add_written(scores.transpose(-1, -2) @ dout, k, inside)
        if dsize is None:
            dsize = (dscaled * v).sum(-1, keepdim=True)
            dscaled.mul_(size)
        parts = (through_unit(dq, q, q_norm), through_unit(dk, k, k_norm), dscaled, dsize)
        for whole, part in zip(grads, parts, strict=True):
            unfold(whole[..., None] if whole.dim() == 3 else whole, block, part)
        return gradient

    def _inputs(self, block: Block, sight: Sight) -> Any:
        """((unit q, its norms), (unit k, its norms), v, size), folded; zeros at padding, whatever it holds."""
        q, k, v, size = (fold(x, block, self.group, self.dtype) for x in (self.q, self.k, self.v, self.size))
        if sight.valid is not None:
            k, v = (x.masked_fill(~sight.valid, 0.0) for x in (k, v))
            q = q.unflatten(3, (-1, block.size)).masked_fill(~sight.valid[:, :, :, None], 0.0).flatten(3, 4)
        return unit(q), unit(k), v, size

    def _remember(
        self, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, sight: Sight
    ) -> tuple[torch.Tensor, torch.Tensor]:
        local = times(k, sight.after).transpose(-1, -2) @ v
        return memory.forwards(state, local, None, None, sight.kept)

    def _read(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: torch.Tensor, sight: Sight
    ) -> torch.Tensor:
        return sight.add_read(sight.pairs(q @ k.transpose(-1, -2)) @ v, q, before)

    def _sight(self, block: Block) -> Sight:
        if self.runs is not None:
            return self.runs.sight(block, self.dtype)
        if block.size not in self._sights:
            self._sights[block.size] = causal_sight(block.size, self.dtype, self.q.device)
        return self._sights[block.size]


def unit(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of length 1 and the length they had; zero rows stay zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(EPSILON)
    return x / norm, norm


def through_unit(gradient: torch.Tensor, unit: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """The gradient of x from that of x / ||x||."""
    along = (gradient * unit).sum(-1, keepdim=True)
    return gradient.addcmul_(unit, along, value=-1.0).div_(norm)
