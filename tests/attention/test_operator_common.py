"""ring_attention as a torch.library operator: opcheck, compile, checkpointing without a second round of hops."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import longctx
import longctx.attention.block
from longctx.attention.comm import counters
from longctx.attention.ring import ring_attention  # registers the operators

from distributed import run_ranks

OPERATORS = torch.ops.longctx


def tensors(seed: int = 0, tokens: int = 16) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    shapes = (1, 2, tokens, 4), (1, 1, tokens, 4), (1, 1, tokens, 3)
    return tuple(torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes)


def per_head() -> tuple[torch.Tensor, ...]:
    """A sink and slopes for two heads."""
    return tuple(x.double().requires_grad_() for x in (torch.tensor([0.3, -1.0]), torch.tensor([0.1, 0.02])))


@pytest.mark.parametrize("documents", [None, torch.arange(16, dtype=torch.int32)[None] // 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("extras", [False, True])
def test_opcheck(documents: torch.Tensor | None, dtype: torch.dtype, extras: bool) -> None:
    inputs: tuple[Any, ...] = tuple(x.detach().to(dtype).requires_grad_() for x in tensors())
    inputs = (*inputs, *(per_head() if extras else (None, None)))
    seeds, rest = (torch.tensor([7]), (0.5, 2.0, 0.3, "auto")) if extras else (None, (0.5, None, 0.0, "auto"))
    block = (documents, documents, seeds, 0, 7, 0, *rest)
    ring = (documents, seeds, "", "zigzag", 7, 0, 15, *rest)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if dtype == torch.bfloat16:
        tests.remove("test_aot_dispatch_dynamic")  # compares gradients at a tolerance of its own
    torch.library.opcheck(OPERATORS.block_attention.default, (*inputs, *block), test_utils=tests)
    torch.library.opcheck(OPERATORS.ring_attention.default, (*inputs, *ring), test_utils=tests)
    plain = tuple(None if x is None else x.detach() for x in inputs)
    results = OPERATORS.ring_attention(*plain, *ring)
    grads = tuple(torch.randn_like(x) for x in results)
    torch.library.opcheck(OPERATORS.ring_attention_backward.default, (*grads, *results, *plain, *ring))
    torch.library.opcheck(OPERATORS.block_attention_backward.default, (*grads, *results, *plain, *block))


def test_gradcheck_with_the_lse() -> None:
    assert torch.autograd.gradcheck(partial(ring_attention, window=5, return_lse=True), tensors())
    documents = torch.arange(16)[None] // 6
    assert torch.autograd.gradcheck(partial(ring_attention, causal=False, document_ids=documents, length=14), tensors())

    def with_extras(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor, alibi: torch.Tensor) -> Any:
        return ring_attention(q, k, v, sink=sink, alibi=alibi, softcap=1.5, dropout_p=0.3, dropout_seed=1)

    assert torch.autograd.gradcheck(with_extras, (*tensors(), *per_head()))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool, extras: bool) -> None:
    mesh = longctx.Mesh(ring=1, world_size=1, rank=0)
    sink, alibi = per_head() if extras else (None, None)
    more: dict[str, Any] = {"softcap": 1.5, "dropout_p": 0.3, "dropout_seed": 11} if extras else {}

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ring_attention(q * 2, k, v, mesh=mesh, window=9, sink=sink, alibi=alibi, **more).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (16, 24):
        inputs = tensors(tokens=tokens)
        expected, got = (torch.autograd.grad(f(*inputs), inputs) for f in (function, compiled))
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_results_can_be_changed_in_place() -> None:
    """dK and dV come in one buffer, side by side: changing one result leaves all others alone."""
    q, k, v = tensors()
    out = ring_attention(q, k, v)
    results = (out.detach(), *torch.autograd.grad(out.sum(), (q, k, v)))
    copies = [x.clone() for x in results]
    for changed in range(4):
        results[changed].add_(1.0)
        copies[changed].add_(1.0)
        assert all(torch.equal(a, b) for a, b in zip(results, copies, strict=True))


def test_no_gradient_is_kept_without_grad() -> None:
    with torch.no_grad():
        assert ring_attention(*tensors()).grad_fn is None


@cache
def mesh_of(ring: int) -> longctx.Mesh:
    return longctx.Mesh(ring=ring)


def save_attention(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = operator == OPERATORS.ring_attention.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_worker(rank: int, world: int) -> dict[str, Any]:
    """Gradients and K/V hops of one layer: plain, under both kinds of checkpoint, and with the results saved."""
    weight, mesh = torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4), mesh_of(world)

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ring_attention(q @ weight, k @ weight, v, mesh=mesh).tanh()

    ways = {
        "plain": layer,
        "checkpoint": partial(checkpoint, layer, use_reentrant=False),
        "reentrant": partial(checkpoint, layer, use_reentrant=True),
        "selective": partial(
            checkpoint,
            layer,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, save_attention),
        ),
        "compiled": torch.compile(layer, fullgraph=True, backend="aot_eager"),
    }
    results = {}
    for name, function in ways.items():
        inputs = tensors(rank)
        counters.reset()
        function(*inputs).square().sum().backward()  # (the reentrant kind refuses autograd.grad)
        results[name] = (counters.hops, counters.gradient_hops, [x.grad for x in inputs])
    return results


def test_a_checkpoint_that_saves_the_results_repeats_no_hop() -> None:
    hops = {"plain": 2, "checkpoint": 3, "reentrant": 3, "selective": 2, "compiled": 2}
    for results in run_ranks(2, checkpoint_worker):
        for name, (kv, gradient, grads) in results.items():
            assert (kv, gradient) == (hops[name], 2), name
            assert all(torch.equal(a, b) for a, b in zip(grads, results["plain"][2], strict=True)), name
