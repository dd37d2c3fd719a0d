"""A ring in sequence on one GPU: every rank's every step, one after another, as one differentiable function.

The same pairs as one call, cut into ring ** 2 steps, with no message: what it takes longer is the price of splitting
(the running state read and written once a step, smaller launches).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.rows import Row
from longctx.attention.backends.base import BackwardQueries, KeyBlock, StepGradients
from longctx.attention.backends.triton import TritonBackend
from longctx.attention.band import make_rule, sees
from longctx.attention.mask import BlockMask
from longctx.attention.scores import Scores
from longctx.layout import Span, get_layout


def attention(row: Row, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (B, H, T, D), k, v (B, G, T, D), in the ring's order: rank 0's tokens first. Any one order costs the same."""
    return _Ring.apply(q, k, v, row)


def order(row: Row) -> torch.Tensor:
    """(T,): the global index of every token in the ring's order."""
    spans = [span for rank in range(row.ring) for span in _spans(row, rank)]
    return torch.cat([torch.arange(span.start, span.last + 1) for span in spans])


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: Row) -> torch.Tensor:
        out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=torch.float32, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        for own, visits in _steps(row):
            for turn, (there, mask) in enumerate(visits):
                block = KeyBlock(k[:, :, there], v[:, :, there], mask, _scores(q))
                _BACKEND.forward_step(q[:, :, own], block, out[:, :, own], lse[:, :, own], not turn)
        ctx.row = row
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        return result

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (k, v))
        for own, visits in _steps(ctx.row):
            rows = BackwardQueries(q[:, :, own], out[:, :, own], lse[:, :, own], dout[:, :, own], None)
            prepared = _BACKEND.prepare_backward(rows)
            for turn, (there, mask) in enumerate(visits):
                block = KeyBlock(k[:, :, there], v[:, :, there], mask, _scores(q))
                part_k, part_v = (torch.empty(x.shape, dtype=dq.dtype, device=x.device) for x in (block.k, block.v))
                _BACKEND.backward_step(prepared, block, StepGradients(dq[:, :, own], part_k, part_v, None), not turn)
                dk[:, :, there] += part_k
                dv[:, :, there] += part_v
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


_BACKEND = TritonBackend()


def _scores(q: torch.Tensor) -> Scores:
    return Scores(q.shape[-1] ** -0.5)


def _spans(row: Row, rank: int) -> tuple[Span, ...]:
    return get_layout("zigzag").spans(rank, row.ring, row.length)


def _steps(row: Row) -> Iterator[tuple[slice, list[tuple[slice, BlockMask]]]]:
    """(a rank's tokens, [(a block's tokens, who sees whom) in the order the ring brings them])."""
    part, rule = row.length // row.ring, make_rule(row.causal, row.window)
    for rank in range(row.ring):
        visits = []
        for turn in range(row.ring):
            source = (rank - turn) % row.ring
            mask = BlockMask(_spans(row, rank), _spans(row, source), rule)
            if sees(mask.q_spans, mask.k_spans, rule):
                visits.append((slice(source * part, (source + 1) * part), mask))
        yield slice(rank * part, (rank + 1) * part), visits
