"""ring_attention on meshes with ulysses > 1, in real gloo processes: against dense fp64 attention, and its operator."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import pytest
import torch
from attention import dense, extras
from attention.hybrid import parts
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import longctx
from longctx.attention.band import make_rule
from longctx.attention.comm import counters
from longctx.attention.replay import keep_attention
from longctx.attention.ring import ring_attention  # registers the operators

from distributed import run_ranks
from tolerances import tolerance

HEADS = (6, 2)  # three query heads read a key head: four members share them unequally


@cache
def grid_mesh(ring: int, ulysses: int) -> longctx.Mesh:
    """One mesh a grid and process, so that groups are made once."""
    return longctx.Mesh(ring=ring, ulysses=ulysses)


def tensors(length: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """q, k, v, dout, dlse of the whole sequence; d_v != d_k."""
    g, (h, kv) = torch.Generator().manual_seed(seed), HEADS
    shapes = (2, h, length, 6), (2, kv, length, 6), (2, kv, length, 5), (2, h, length, 5), (2, h, length)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)


def case(name: str, length: int) -> dict[str, Any]:
    """Arguments of ring_attention for the whole sequence, by name."""
    ids = torch.stack([torch.arange(length) * 7 // length, torch.arange(length) * 3 // length])
    ids[0, length // 3 : length // 3 + 5] = -1
    return {
        "causal": {},
        "full short": {"causal": False, "length": length - 5},
        "documents": {"document_ids": ids},
        "everything": {"window": 13, "document_ids": ids, "length": length - 3, "scale": 0.7},
    }[name]


CASES = {"causal": "", "full short": "alibi+sink", "documents": "", "everything": extras.TOGETHER}
"""Each with the extras that go with it."""


def worker(rank: int, world: int, ring: int, length: int, dtype: torch.dtype) -> Any:
    ulysses, results = world // ring, {}
    for layout, names in (("contiguous", ("causal",)), ("zigzag", tuple(CASES)), ("striped", ("documents",))):
        index = parts(layout, ring, ulysses, length)[rank]
        for name in names:
            more = CASES[name]
            q, k, v, dout, dlse = (x[:, :, index].contiguous() for x in tensors(length, dtype=dtype))
            extra = extras.make(more, HEADS[0], 2)
            per_head = [None if x is None else x.to(dtype) for x in (extra.sink, extra.alibi)]
            inputs = [x.requires_grad_() for x in (q, k, v, *per_head) if x is not None]
            arguments = {**case(name, length), **extras.arguments(extra), "sink": per_head[0], "alibi": per_head[1]}
            if "document_ids" in arguments:
                arguments["document_ids"] = arguments["document_ids"][:, index]
            out, lse = ring_attention(
                q, k, v, mesh=grid_mesh(ring, ulysses), layout=layout, return_lse=True, **arguments
            )
            objective = (out * dout).sum() + (lse.masked_fill(lse == -math.inf, 0.0) * dlse).sum()
            results[layout, name] = (out.detach(), lse.detach(), *torch.autograd.grad(objective, inputs))
    return results


@pytest.mark.parametrize(
    ("ring", "ulysses", "dtype"),
    [
        (1, 2, torch.float64),
        (2, 2, torch.float64),
        (1, 4, torch.float64),
        pytest.param(2, 3, torch.float64, marks=pytest.mark.deep),
        pytest.param(2, 2, torch.float32, marks=pytest.mark.deep),
    ],
)
def test_equals_dense(ring: int, ulysses: int, dtype: torch.dtype) -> None:
    length = 8 * ring * ulysses
    answers = run_ranks(ring * ulysses, worker, ring, length, dtype)
    q, k, v, dout, dlse = tensors(length, dtype=dtype)
    for layout, name in answers[0]:
        order = torch.cat(parts(layout, ring, ulysses, length)).argsort()
        whole = [torch.cat([a[layout, name][i] for a in answers], 2)[:, :, order] for i in range(5)]
        per_head = [
            torch.stack([a[layout, name][i] for a in answers]).sum(0) for i in range(5, len(answers[0][layout, name]))
        ]
        arguments, extra = case(name, length), extras.make(CASES[name], HEADS[0], 2)
        ids, index = arguments.get("document_ids"), torch.arange(length)
        rule = make_rule(arguments.get("causal", True), arguments.get("window"), arguments.get("length"))
        allowed = dense.visible(index, index, rule) & dense.same_document(ids, ids)
        expected = dense.attention(q, k, v, allowed, arguments.get("scale", 6**-0.5), dout, dlse, extra)
        limit = tolerance("fp64" if dtype == torch.float64 else "fp32")
        assert dense.relative_difference(dense.Results(*whole, *per_head), expected) <= limit, (layout, name)


def save_attention(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = operator == torch.ops.longctx.hybrid_attention.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def ways_worker(rank: int, world: int, ring: int) -> dict[str, Any]:
    """(hops, exchanges, bytes of exchanges, gradients) of one layer: plain, checkpointed in every way, compiled."""
    weight, mesh = torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6), grid_mesh(ring, world // ring)

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ring_attention(q @ weight, k @ weight, v, mesh=mesh).tanh()

    once = partial(checkpoint, layer, use_reentrant=False)
    ways = {
        "plain": layer,
        "checkpoint": once,
        "kept": partial(once, context_fn=keep_attention),
        "selective": partial(once, context_fn=partial(create_selective_checkpoint_contexts, save_attention)),
        "compiled": torch.compile(layer, fullgraph=True, backend="aot_eager"),
    }
    results = {}
    for name, function in ways.items():
        inputs = [x.requires_grad_() for x in tensors(8, rank)[:3]]
        counters.reset()
        function(*inputs).square().sum().backward()
        results[name] = (counters.hops, counters.exchanges, counters.exchange_bytes, [x.grad for x in inputs])
    return results


@pytest.mark.parametrize("ring", [pytest.param(1, marks=pytest.mark.deep), 2])
def test_a_checkpoint_that_keeps_the_results_repeats_neither_exchange_nor_hop(ring: int) -> None:
    for results in run_ranks(2 * ring, ways_worker, ring):
        hops, exchanges, nbytes, gradients = results["plain"]
        assert (hops, exchanges) == (2 * (ring - 1), 4)
        for name, got in results.items():
            repeats = name == "checkpoint"
            assert got[:2] == (hops + repeats * (ring - 1), exchanges + repeats * 2), name
            assert all(torch.equal(a, b) for a, b in zip(got[3], gradients, strict=True)), name
            if name in ("selective", "compiled"):
                assert got[2] == nbytes
        batch, (h, g), tokens = 2, HEADS, 8  # kept: q, k, v and out travel again, with dout; never lse
        again = batch * tokens * (h * (6 + 5) + g * (6 + 5)) // 2 * 8
        assert results["kept"][2] == nbytes + again


def alone_worker(rank: int, world: int) -> Any:
    """Gradients with none of the inputs frozen, then each in turn; lse used on one rank only; nothing used on one."""
    mesh, results = grid_mesh(1, world), []
    for frozen in (None, 0, 1, 2):
        inputs = tensors(8)[:3]
        for i, x in enumerate(inputs):
            x.requires_grad_(i != frozen)
        ring_attention(*inputs, mesh=mesh).square().sum().backward()
        results.append([x.grad for x in inputs])
    q, k, v = (x.requires_grad_() for x in tensors(8)[:3])
    out, lse = ring_attention(q, k, v, mesh=mesh, return_lse=True)
    (lse.sum() if rank == 0 else 0.0 * out.sum()).backward()
    return results, (float(q.grad.abs().max()), float(k.grad.abs().max()), float(v.grad.abs().max()))


def test_frozen_inputs_and_unused_results_neither_hang_nor_change_the_others() -> None:
    answers = run_ranks(2, alone_worker, timeout=60)
    for (free, *frozen), _ in answers:
        for index, grads in enumerate(frozen):
            assert grads[index] is None
            assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(grads, free, strict=True)) if i != index)
    (q0, k0, v0), (q1, k1, v1) = (grads for _, grads in answers)
    assert q0 > 0 and k0 > 0 and q1 == k1 == v0 == v1 == 0  # causal: rank 0 sees no key of rank 1


def opcheck_worker(rank: int, world: int) -> None:
    mesh = grid_mesh(1, world)
    sink, slopes = (torch.linspace(0.1, 0.5, HEADS[0], dtype=torch.float64).requires_grad_() for _ in range(2))
    documents = (torch.arange(8, dtype=torch.int32) // 5).expand(2, -1).contiguous()
    settings = (documents, torch.tensor([7, 8]), mesh.key, "zigzag", 7, 0, 15, 0.5, 2.0, 0.3, "auto")
    for flags in ((True, False), (False, True)):  # with lse, lean
        inputs = tuple(x.requires_grad_() for x in tensors(8)[:3])
        arguments = (*inputs, sink, slopes, *settings, *flags)
        torch.library.opcheck(torch.ops.longctx.hybrid_attention.default, arguments)


def test_opcheck() -> None:
    run_ranks(2, opcheck_worker)


def test_more_members_than_heads_is_refused() -> None:
    mesh = longctx.Mesh(ulysses=8, world_size=8, rank=0)
    with pytest.raises(longctx.LongctxError, match="at most ulysses=6"):
        ring_attention(*tensors(8)[:3], mesh=mesh)
