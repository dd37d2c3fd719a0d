"""Causal cosine attention over a local sequence by chunks, with its own backward (docs/methods/cottention.md).

With S the state before a chunk, N(x) = x / ||x|| and scaled values v' = size v:

    out = visible(N(q) N(k)^T) v' + N(q) S

in fp32 (fp64 for fp64 inputs). Backward computes the same kind of product three times, with S and with the gradient of
S that comes from later chunks. With `on_query`, size multiplies the output instead of the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from longctx.bounded import recurrence
from longctx.bounded.chunks import Block, ChunkMasks, times, unfold
from longctx.bounded.walk import ChunkWalk, block_count, blocks_of
from longctx.kernels.cosine.reference import EPSILON

Optional = torch.Tensor | None


class CosineTensors(NamedTuple):
    """The tensors of one call: q (B, H, T, D) and k (B, G, T, D), not normalised, v (B, G, T, Dv).

    size: n^-a, (B, G, T) for the values, or (B, H, T) for the outputs with `on_query`. state: (B, G, D, Dv), S before.
    ids (B, T) and document (B,) as in `Runs`, or None for one document.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    size: torch.Tensor
    state: torch.Tensor
    ids: Optional = None
    document: Optional = None


@torch.library.custom_op("longctx::cosine_chunks", mutates_args=())
def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    size: torch.Tensor,
    state: torch.Tensor,
    ids: Optional,
    document: Optional,
    *,
    on_query: bool,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return out, S after the last token, and S before each block, which backward starts from (no gradient).

    Tensors as in `CosineTensors`; chunk: tokens per chunk.
    """
    walk = _CosineWalk(CosineTensors(q, k, v, size, state, ids, document), on_query)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    starts = []
    for block in blocks_of(q, chunk):
        starts.append(state)
        state = walk.forward(block, state, out)
    return out, state.clone(), torch.stack(starts)


@chunked.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: torch.Tensor, state: torch.Tensor, *documents: Any,
    on_query: bool, chunk: int,
) -> Any:  # fmt: skip
    starts = state.new_empty((block_count(q, chunk), *state.shape))
    return q.new_empty((*q.shape[:3], v.shape[3])), torch.empty_like(state), starts


@torch.library.custom_op("longctx::cosine_chunks_backward", mutates_args=())
def chunked_backward(
    dout: torch.Tensor,
    dstate: torch.Tensor,
    starts: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    size: torch.Tensor,
    documents: Sequence[Optional],
    *,
    on_query: bool,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k, v, size and of the state before; documents: ids and document."""
    walk = _CosineWalk(CosineTensors(q, k, v, size, dstate, *documents), on_query)
    gradient = dstate.clone()
    dq, dk, dv, dsize = grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, size)]
    for block, state in reversed(list(zip(blocks_of(q, chunk), starts, strict=True))):
        gradient = walk.backward(block, state, dout, gradient, grads)
    return dq, dk, dv, dsize, gradient


@chunked_backward.register_fake
def _(dout: torch.Tensor, dstate: torch.Tensor, starts: torch.Tensor, *inputs: Any, **settings: Any) -> Any:
    return (*(x.new_empty(x.shape) for x in inputs[:4]), torch.empty_like(dstate))


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Any, ...]) -> None:
    q, k, v, size, _, ids, document = inputs
    ctx.settings = keyword_only_inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], q, k, v, size, ids, document)


def _differentiate(ctx: Any, dout: Optional, dstate: Optional, _: Any) -> Any:
    starts, q, k, v, size, ids, document = ctx.saved_tensors
    dout = q.new_zeros((*q.shape[:3], v.shape[3])) if dout is None else dout
    dstate = starts.new_zeros(starts.shape[1:]) if dstate is None else dstate
    grads = chunked_backward(dout, dstate, starts, q, k, v, size, [ids, document], **ctx.settings)
    return *grads, None, None


chunked.register_autograd(_differentiate, setup_context=_save)


class _CosineWalk(ChunkWalk):
    """The blocks of one call, in either direction."""

    def __init__(self, x: CosineTensors, on_query: bool) -> None:
        super().__init__(x.q, x.k, x.v, x.ids, x.document)
        self.size, self.on_query = x.size[..., None], on_query

    def forward(self, block: Block, state: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write the block's outputs and return the state after it."""
        folded = _Block(self, block, state)
        part = folded.read()
        unfold(out, block, part.mul_(folded.size) if self.on_query else part)
        return folded.after

    def backward(
        self, block: Block, state: torch.Tensor, dout: torch.Tensor, gradient: torch.Tensor, grads: list[torch.Tensor]
    ) -> torch.Tensor:
        """Write the block's gradients into `grads` and return the gradient of the state before it."""
        folded = _Block(self, block, state)
        masks, q, k, size, scaled = folded.masks, folded.q, folded.k, folded.size, folded.scaled
        dout = self.fold(dout, block).contiguous()
        dsize = None
        if self.on_query:
            dsize = (dout * folded.read()).sum(-1, keepdim=True)
            dout = dout * size
        # The gradient of the scores, and through it and S that of N(q).
        dscores = masks.mask_pairs(dout @ scaled.transpose(-1, -2))
        dq = masks.add_read(dscores @ k, dout, folded.before.transpose(-1, -2))
        # The gradient of S as each chunk wrote it: from later chunks of this block, and from later blocks.
        local = masks.mask_rows(q).transpose(-1, -2) @ dout
        written, gradient = recurrence.backwards(gradient, local, None, None, masks.kept)
        dk = masks.add_written(dscores.transpose(-1, -2) @ q, scaled, written.transpose(-1, -2))
        scores = masks.mask_pairs(q @ k.transpose(-1, -2))
        dscaled = masks.add_written(scores.transpose(-1, -2) @ dout, k, written)
        if dsize is None:
            dsize = (dscaled * folded.v).sum(-1, keepdim=True)
            dscaled.mul_(size)
        parts = (through_unit(dq, q, folded.q_norm), through_unit(dk, k, folded.k_norm), dscaled, dsize)
        for whole, part in zip(grads, parts, strict=True):
            unfold(whole[..., None] if whole.dim() == 3 else whole, block, part)
        return gradient


class _Block:
    """One block, folded: unit q and k with their norms, v, size, scaled values, S before each chunk and after all."""

    def __init__(self, walk: _CosineWalk, block: Block, state: torch.Tensor) -> None:
        self.masks: ChunkMasks = walk.masks(block)
        q, k, self.v = walk.inputs(block, self.masks)
        self.size = walk.fold(walk.size, block)
        (self.q, self.q_norm), (self.k, self.k_norm) = unit(q), unit(k)
        self.scaled = self.v.contiguous() if walk.on_query else self.v * self.size
        local = times(self.k, self.masks.after).transpose(-1, -2) @ self.scaled
        self.before, self.after = recurrence.forwards(state, local, None, None, self.masks.kept)

    def read(self) -> torch.Tensor:
        """Return the outputs, before any scale on the query."""
        scores = self.masks.mask_pairs(self.q @ self.k.transpose(-1, -2))
        return self.masks.add_read(scores @ self.scaled, self.q, self.before)


def unit(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of length 1 and their former norms; zero rows stay zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(EPSILON)
    return x / norm, norm


def through_unit(gradient: torch.Tensor, unit: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Return the gradient of x from that of x / ||x||; in place."""
    along = (gradient * unit).sum(-1, keepdim=True)
    return gradient.addcmul_(unit, along, value=-1.0).div_(norm)
