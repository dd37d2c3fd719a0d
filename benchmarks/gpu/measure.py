"""Measure one figure: the median of several timed calls with a cold L2 cache, on random data."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.contestants import Call, Inputs
from benchmarks.gpu.rows import Row
from benchmarks.measure import relative_error
from longctx import block_attention
from longctx.attention.band import make_rule, visible
from longctx.layout import Span

SECONDS = 0.5
"""Of timed calls per figure, at most; at least three calls."""
LONGEST_CHECK = 1024
LIMITS = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-5}
"""Relative error (norm) against fp64 at which results count as wrong."""


def make_inputs(row: Row, device: torch.device, seed: int = 0) -> Inputs:
    """Return random tensors: zeros would make a GPU look faster than it is."""
    g = torch.Generator(device).manual_seed(seed)

    def random(heads: int) -> torch.Tensor:
        shape = (row.batch, heads, row.length, row.head_dim)
        return torch.randn(shape, generator=g, device=device).to(getattr(torch, row.dtype))

    documents = None
    if row.documents > 1:
        ids = torch.arange(row.length, device=device) * row.documents // row.length
        documents = ids.expand(row.batch, -1).contiguous()
    q, k, v = (random(heads).requires_grad_() for heads in (row.heads, row.kv_heads, row.kv_heads))
    return Inputs(q, k, v, documents, random(row.heads))


def flops(row: Row) -> float:
    """Return the FLOPs of a forward: two products per visible pair. A backward counts as 2.5 times that."""
    rule = make_rule(row.causal, row.window)
    spans = (Span(0, row.length // row.documents),)
    pairs = visible(spans, spans, rule) * row.documents
    return 4.0 * pairs * row.head_dim * row.batch * row.heads


def errors(call: Call, x: Inputs, row: Row, order: torch.Tensor | None = None) -> tuple[float, ...]:
    """Return the relative errors of (out, dq, dk, dv) against fp64. `order`: global index of every token of `x`."""
    back = torch.arange(row.length) if order is None else order.argsort()
    exact = [t.detach()[:, :, back].double().requires_grad_() for t in (x.q, x.k, x.v)]
    truth = block_attention(
        *exact, causal=row.causal, window=row.window, document_ids=x.documents, backend="reference"
    )[0]
    true = (truth.detach(), *torch.autograd.grad(truth, exact, x.dout[:, :, back].double()))
    out = call()
    got = (out.detach(), *torch.autograd.grad(out, (x.q, x.k, x.v), x.dout))
    return tuple(relative_error(a[:, :, back], b) for a, b in zip(got, true, strict=True))


def times(call: Call, x: Inputs) -> tuple[float, float]:
    """Return the seconds of (forward, backward)."""
    out = call()
    backward = seconds_of(lambda: torch.autograd.grad(out, (x.q, x.k, x.v), x.dout, retain_graph=True), x.q.device)
    with torch.no_grad():
        return seconds_of(call, x.q.device), backward


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    flush = torch.empty(128 * 2**20, dtype=torch.int16, device=device)
    estimate = max(_event(call, flush), 1e-6)
    return median(_event(call, flush) for _ in range(max(3, min(50, int(SECONDS / estimate)))))


def _event(call: Callable[[], Any], flush: torch.Tensor) -> float:
    flush.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def matmul_rate(device: torch.device) -> float:
    """Return the FLOP/s of an 8192^3 bf16 product of random matrices: this run's roof."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * 8192**3 / seconds_of(lambda: a @ b, device)
