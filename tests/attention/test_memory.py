"""Peak memory of attention, exact to the byte (the profiler's memory events): linear in the local tokens, blind to the
global length.

A rank of a large ring is played by `LoopbackLink`, which allocates what a real link does. Units: one tensor of q's
size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from longctx.attention.backends.base import BackwardQueries
from longctx.attention.backends.choose import choose_backend
from longctx.attention.band import make_rule
from longctx.attention.comm import LocalLink, LoopbackLink
from longctx.attention.passes import Passes
from longctx.attention.scores import Scores

HEADS, DIM = 8, 32


def peak(function: Callable[[], Any]) -> tuple[int, int, Any]:
    """(largest sum of live bytes, largest allocation, result), beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = top = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        top, largest = max(top, live), max(largest, event.nbytes())
    assert events
    return top, largest, result


def measured(
    tokens: int,
    ring: int = 1,
    kv_heads: int = HEADS,
    dtype: torch.dtype = torch.float32,
    documents: int | None = None,
    window: int | None = None,
    backend: str = "aten",
) -> tuple[int, int, int]:
    """(forward's peak, backward's peak, largest allocation) in bytes, of one rank."""
    q, dout = (torch.randn(1, HEADS, tokens, DIM).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, kv_heads, tokens, DIM).to(dtype) for _ in range(2))
    ids = None if documents is None else (torch.arange(tokens, dtype=torch.int32) // documents)[None]
    link = LoopbackLink(ring) if ring > 1 else LocalLink()
    scores = Scores(0.2)
    passes = Passes(link, "zigzag", make_rule(True, window), scores, choose_backend(backend, q, v, scores))
    forward, first, (out, lse) = peak(lambda: passes.forward(q, k, v, ids))
    backward, second, _ = peak(lambda: passes.backward(BackwardQueries(q, out, lse, dout, None), k, v, ids))
    return forward, backward, max(first, second)


def test_the_measure_is_exact() -> None:
    def function() -> torch.Tensor:
        kept = torch.ones(1 << 20)
        torch.ones(1 << 18)
        return kept

    assert peak(function)[:2] == (5 << 20, 4 << 20)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"ring": 4}, {"ring": 4, "kv_heads": 2}, {"documents": 700}, {"documents": 20}, {"window": 300}],
    ids=str,
)
def test_doubling_the_tokens_doubles_the_peak(arguments: dict[str, Any]) -> None:
    small, large = measured(2048, **arguments), measured(4096, **arguments)
    for a, b in zip(small[:2], large[:2], strict=True):
        assert b <= 2.02 * a
    assert large[2] <= 2 * small[2]


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_a_longer_sequence_at_equal_local_length_costs_no_byte(backend: str) -> None:
    """Rings of 4 and 32: the global length grows eightfold, no buffer does."""
    for documents in (None, 100):
        small, large = (measured(256, ring, documents=documents, backend=backend) for ring in (4, 32))
        assert small == large


def test_peaks_stay_within_their_budget() -> None:
    """Forward: out; the block here and the one coming. Backward: dq; the same two blocks; dK/dV of this stage, of the
    previous one under way, and arriving. And what a fused call returns for one head before it is added."""
    tokens = 4096
    unit, head, lse = HEADS * tokens * DIM * 4, tokens * DIM * 4, HEADS * tokens * 4
    scratch = 2 << 20  # of the fused operator, whatever the lengths
    for ring, kv_heads in ((1, 8), (1, 2), (4, 8), (4, 2)):
        block = 2 * unit * kv_heads // HEADS
        forward, backward, _ = measured(tokens, ring, kv_heads)
        moving, gradients = (0, block) if ring == 1 else (2 * block, 3 * block)
        assert forward <= unit + moving + 2 * lse + head + scratch
        assert backward <= unit + moving + gradients + lse + 3 * head + scratch


def test_one_device_needs_no_more_than_torchs_own() -> None:
    q, k, v = (torch.randn(1, HEADS, 4096, DIM).requires_grad_() for _ in range(3))

    def sdpa() -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.detach(), torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    forward, backward, _ = measured(4096)
    assert forward + backward <= 1.25 * peak(sdpa)[0]
