"""backend="triton" as an operator of torch.library: opcheck, compilation without a graph break, and checkpoints that
save (out, lse) and so launch no forward twice."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longctx import block_attention, ring_attention
from longctx.attention.backends.triton import TritonBackend

from tolerances import tolerance

OPERATORS = torch.ops.longctx
CELLS = [
    ("block_attention", False),
    ("ring_attention", True),
    *(pytest.param(*cell, marks=pytest.mark.deep) for cell in (("block_attention", True), ("ring_attention", False))),
]
EXTRAS = {"softcap": 2.0, "dropout_p": 0.3, "dropout_seed": 7}


def tensors(tokens: int = 16) -> tuple[torch.Tensor, ...]:
    """q, k, v with d_v != d_k and shared key heads."""
    g = torch.Generator().manual_seed(0)
    shapes = (1, 2, tokens, 8), (1, 1, tokens, 8), (1, 1, tokens, 5)
    return tuple(torch.randn(shape, generator=g).requires_grad_() for shape in shapes)


def per_head() -> tuple[torch.Tensor, ...]:
    """A sink and slopes for two heads."""
    return tuple(torch.tensor(x).requires_grad_() for x in ([0.3, -1.0], [0.1, 0.02]))


@pytest.mark.parametrize(("operator", "extras"), CELLS)
def test_opcheck(operator: str, extras: bool) -> None:
    """Schema, fake tensors, autograd registration and tracing, forward and backward."""
    documents = torch.arange(16, dtype=torch.int32)[None] // 5
    inputs: tuple[Any, ...] = (*tensors(), *(per_head() if extras else (None, None)))
    seeds, rest = (torch.tensor([7]), (0.5, 2.0, 0.3, "triton")) if extras else (None, (0.5, None, 0.0, "triton"))
    block, ring = (documents, documents, seeds, 0, 7, 0), (documents, seeds, "", "zigzag", 7, 0, 15)
    settings = (*(block if operator == "block_attention" else ring), *rest)
    torch.library.opcheck(getattr(OPERATORS, operator).default, (*inputs, *settings))
    plain = tuple(None if x is None else x.detach() for x in inputs)
    results = getattr(OPERATORS, operator)(*plain, *settings)
    grads = tuple(torch.randn_like(x) for x in results)
    backward = getattr(OPERATORS, f"{operator}_backward").default
    torch.library.opcheck(backward, (*grads, *results, *plain, *settings))


@pytest.mark.parametrize(("operator", "extras"), CELLS)
def test_compiles_without_a_graph_break(operator: str, extras: bool) -> None:
    """A change of length included: the second one is traced as a symbol."""
    attention: Any = {"block_attention": block_attention, "ring_attention": ring_attention}[operator]
    sink, alibi = per_head() if extras else (None, None)
    settings: dict[str, Any] = {"backend": "triton", "window": 9, **(EXTRAS if extras else {})}

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attention(q * 2, k, v, sink=sink, alibi=alibi, **settings)
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=None)
    for tokens in (16, 24):
        inputs = tensors(tokens)
        expected, got = (torch.autograd.grad(f(*inputs), inputs) for f in (function, compiled))
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def save_attention(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = operator in (OPERATORS.ring_attention.default, OPERATORS.block_attention.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def test_a_checkpoint_that_saves_the_results_launches_no_forward_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, forward = [], TritonBackend.forward_step

    def counted(*arguments: Any) -> None:
        launched.append(1)
        forward(*arguments)

    monkeypatch.setattr(TritonBackend, "forward_step", counted)
    weight = torch.linspace(-1, 1, 64).view(8, 8)

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = ring_attention(q @ weight, k @ weight, v, backend="triton", **EXTRAS)
        assert isinstance(out, torch.Tensor)
        return out.tanh()

    contexts = partial(create_selective_checkpoint_contexts, save_attention)
    selective = partial(checkpoint, layer, use_reentrant=False, context_fn=contexts)
    ways = {
        "plain": (layer, 1),
        "checkpoint": (partial(checkpoint, layer, use_reentrant=False), 2),
        "selective": (selective, 1),
        "selective, compiled": (torch.compile(selective, fullgraph=True, backend="aot_eager"), 1),
    }
    grads = {}
    for name, (function, times) in ways.items():
        launched.clear()
        inputs = tensors()
        grads[name] = torch.autograd.grad(function(*inputs).square().sum(), inputs)
        assert len(launched) == times, name
    for name, found in grads.items():
        for ours, theirs in zip(found, grads["plain"], strict=True):
            assert (ours - theirs).abs().max() <= tolerance("fp32") * theirs.abs().max().clamp(min=1.0), name
