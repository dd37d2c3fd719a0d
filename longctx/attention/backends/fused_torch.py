"""torch's fused GPU attention, flash or cuDNN, one call per tile; chosen by the table of measurements.

The operators compute a whole tile, or a triangle aligned at its corner. So they support full and causal attention in
half precision, without windows, documents or padding; the Triton kernels do the rest. A partial result is merged after
each tile, which costs the passes over memory that our kernels save (kernels/flash/README.md). Key heads are repeated
for their query heads. Not run on a GPU: tested against the operators' schemas and with a CPU operator in their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from longctx.attention.backends.aten import Written
from longctx.attention.backends.base import BackwardQueries, KeyBlock, StepGradients
from longctx.attention.band import Kind, Tile
from longctx.attention.mask import BlockMask
from longctx.attention.merge import merge_
from longctx.attention.scores import Scores
from longctx.attention.tiles import index_tiles

WIDEST = {"flash": 256, "cudnn": 128}


@dataclass(frozen=True)
class FusedTorchBackend:
    """One of torch's fused operators as a Backend; `name` is "flash" or "cudnn"."""

    name: str

    def forward_step(self, q: torch.Tensor, block: KeyBlock, out: torch.Tensor, lse: torch.Tensor, first: bool) -> None:
        written = Written(q.shape[0], q.shape[2], (out, 0.0), (lse, -torch.inf))
        if not first:
            written.all()
        for tile in _tiles(block.mask):
            rows, cols = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
            key, value = (_repeated(x[:, :, cols], q) for x in (block.k, block.v))
            causal = tile.kind == Kind.TRIANGLE
            part, part_lse = _forward(self.name, q[:, :, rows], key, value, causal, block.scores.scale)
            if written.first_write(slice(0, q.shape[0]), tile.q0, tile.q1):
                out[:, :, rows], lse[:, :, rows] = part, part_lse
            else:
                merge_(out[:, :, rows], lse[:, :, rows], part, part_lse)
        written.finish()

    def prepare_backward(self, queries: BackwardQueries) -> BackwardQueries:
        return replace(queries, lse=queries.lse.masked_fill(queries.lse == -torch.inf, torch.inf))

    def backward_step(self, prepared: BackwardQueries, block: KeyBlock, gradients: StepGradients, first: bool) -> None:
        if (
            prepared.dlse is not None
        ):  # the operators have no gradient of the lse; our kernels do, from the same (out, lse)
            from longctx.attention.backends.triton import TritonBackend

            ours, lse = TritonBackend(), prepared.lse.masked_fill(prepared.lse == torch.inf, -torch.inf)
            again = ours.prepare_backward(replace(prepared, lse=lse))
            ours.backward_step(again, block, gradients, first)
            return
        dq, dk, dv, _ = gradients
        if first:
            dq.zero_()
        dk.zero_()
        dv.zero_()
        for tile in _tiles(block.mask):
            rows, cols = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
            query, out, dout, lse = (x[:, :, rows] for x in (prepared.q, prepared.out, prepared.dout, prepared.lse))
            key, value = (_repeated(x[:, :, cols], query) for x in (block.k, block.v))
            causal = tile.kind == Kind.TRIANGLE
            saved = BackwardQueries(query, out, lse, dout, None)
            parts = _backward(self.name, saved, key, value, causal, block.scores.scale)
            dq[:, :, rows] += parts[0]
            dk[:, :, cols] += _summed(parts[1], dk)
            dv[:, :, cols] += _summed(parts[2], dv)


def problem(name: str, q: torch.Tensor, v: torch.Tensor, scores: Scores, plain: bool) -> str:
    """Return why that operator cannot compute such a call; empty if it can. plain: only causality hides keys."""
    width = max(q.shape[-1], v.shape[-1])
    if not plain:
        return "it supports no window, no documents and no padding"
    if scores.scale <= 0:
        return f"it takes a scale above 0, not {scores.scale}"
    if scores.extras:
        return f"it cannot do {' and '.join(scores.extras)}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return "it takes bfloat16 and float16"
    if q.shape[-1] != v.shape[-1] or width % 8 or width > WIDEST[name]:
        return f"it takes equal head dimensions, multiples of 8, up to {WIDEST[name]}"
    return ""


def _tiles(mask: BlockMask) -> Iterator[Tile]:
    """Yield rectangles and square triangles."""
    for tile in index_tiles(mask.q_spans, mask.k_spans, mask.rule):
        assert tile.kind != Kind.DENSE, "choose_backend rejects windows"
        corner = tile.q0 + tile.k1 - tile.k0
        if tile.kind == Kind.TRIANGLE and corner < tile.q1:  # the rows below the corner see every column
            yield tile._replace(q1=corner)
            yield tile._replace(kind=Kind.FULL, q0=corner)
        else:
            yield tile


def _forward(
    name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse (B, H, T)) of one tile."""
    if name == "flash":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse.reshape(q.shape[:3])


def _backward(
    name: str, queries: BackwardQueries, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, ...]:
    """Return (dq, dk, dv) of one tile, from the final (out, lse). Without dropout the seed and offset are unused."""
    q, device = queries.q, queries.q.device
    # The operators read out and lse as their own forward lays them out: dense.
    saved = queries.dout.contiguous(), q, k, v, queries.out.contiguous()
    lse, lengths = queries.lse.contiguous(), (q.shape[2], k.shape[2])
    if name == "flash":
        seed = torch.zeros(2, dtype=torch.uint64, device=device)
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *saved, lse, None, None, *lengths, 0.0, causal, seed, seed[:1], scale=scale
        )
    seed = torch.zeros((), dtype=torch.int64, device=device)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *saved, lse[..., None], seed, seed, None, None, None, *lengths, 0.0, causal, scale=scale
    )


def _repeated(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return (B, H, T, D) from (B, G, T, D)."""
    group = q.shape[1] // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, 1)


def _summed(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sum the query heads that share a key head, in the accumulator's dtype: the backward of `_repeated`."""
    return x if x.shape[1] == like.shape[1] else x.unflatten(1, (like.shape[1], -1)).sum(2, dtype=like.dtype)
