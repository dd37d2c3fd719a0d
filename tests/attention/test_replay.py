"""keep_attention: a checkpointed region never runs attention twice, and its gradients are the same to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_tiny import run_ranks
from torch.utils.checkpoint import checkpoint

import longctx
from longctx.attention import comm
from longctx.attention.passes import Passes
from longctx.attention.replay import keep_attention


def layer(x: torch.Tensor, weight: torch.Tensor, mesh: Any) -> torch.Tensor:
    """Two attentions, one after the other, and work around them."""
    for _ in range(2):
        q, k, v = (x * weight).tanh(), x.sin() * weight, x.cos()
        x = x + longctx.ring_attention(q, k, v, mesh=mesh).tanh()
    return x


def run(mesh: Any, **keywords: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """(result, gradient of x, gradient of the weight, hops)."""
    torch.manual_seed(0 if mesh is None else mesh.rank)
    x = torch.randn(1, 2, 8, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    before = comm.counters.hops
    compute = (lambda *args: checkpoint(layer, *args, **keywords)) if keywords else layer
    out = compute(compute(x, weight, mesh), weight, mesh)
    out.sin().sum().backward()
    assert x.grad is not None and weight.grad is not None
    return out.detach(), x.grad, weight.grad, comm.counters.hops - before


def on_a_ring(rank: int, world: int) -> list[Any]:
    mesh = longctx.Mesh(ring=world)
    keep = {"use_reentrant": False, "context_fn": keep_attention}
    return [run(mesh), run(mesh, use_reentrant=False), run(mesh, **keep)]


def test_hops_are_those_of_forward_and_backward_only() -> None:
    for plain, repeated, kept in run_ranks(2, on_a_ring):
        assert plain[3] == kept[3]
        assert repeated[3] > plain[3]
        for ours, truth in zip(kept[:3], plain[:3], strict=True):
            assert torch.equal(ours, truth)


def test_attention_runs_once_and_a_second_backward_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    forward = Passes.forward
    monkeypatch.setattr(Passes, "forward", lambda *args: runs.append(1) or forward(*args))  # type: ignore[func-returns-value]
    x = torch.randn(1, 2, 8, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    out = checkpoint(layer, x, weight, None, use_reentrant=False, context_fn=keep_attention)
    first = torch.autograd.grad(out.sum(), [x, weight], retain_graph=True)
    second = torch.autograd.grad(out.sum(), [x, weight])
    assert len(runs) == 2  # the layer's two attentions
    wanted = torch.autograd.grad(layer(x, weight, None).sum(), [x, weight])
    for got in (first, second):
        assert all(torch.equal(ours, truth) for ours, truth in zip(got, wanted, strict=True))


def test_only_the_second_context_hands_out_what_the_first_has_kept() -> None:
    forward, again = keep_attention()
    x, y = torch.randn(2, 1, 1, 4, 2)
    kept, other = longctx.ring_attention(x, x, x), longctx.ring_attention(y, y, y)
    with forward, pytest.raises(ZeroDivisionError):
        longctx.ring_attention(x, x, x)
        raise ZeroDivisionError
    assert torch.equal(longctx.ring_attention(y, y, y), other)
    with again:
        assert torch.equal(longctx.ring_attention(y, y, y), kept)
    assert torch.equal(longctx.ring_attention(y, y, y), other)
