"""ring_attention in real gloo processes against dense fp64 attention: forward, backward, every mask and layout."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from attention import dense

import longctx
from longctx.attention.band import make_rule
from longctx.attention.comm import counters

from distributed import run_ranks
from tolerances import tolerance


@cache
def ring_mesh(ring: int) -> longctx.Mesh:
    """One mesh a ring size and process, so that groups are made once."""
    return longctx.Mesh(ring=ring)


def case(name: str, length: int) -> dict[str, Any]:
    """Arguments of ring_attention for the whole sequence, by name."""
    ids = torch.arange(length)
    documents = torch.stack([ids * 7 // length, ids * 3 // length])
    documents[0, length // 3 : length // 3 + 5] = -1
    return {
        "causal": {},
        "full": {"causal": False},
        "window": {"window": 11},
        "two-sided window": {"causal": False, "window": (9, 4)},
        "documents": {"document_ids": documents},
        "full documents": {"causal": False, "document_ids": documents},
        "short": {"length": length - 5},
        "full short": {"causal": False, "length": length - 5},
        "everything": {"window": 13, "document_ids": documents, "length": length - 3, "scale": 0.7},
    }[name]


CASES = (
    "causal",
    "full",
    "window",
    "two-sided window",
    "documents",
    "full documents",
    "short",
    "full short",
    "everything",
)


def tensors(length: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """q, k, v, dout, dlse of the whole sequence: GQA 4 to 2, d_v != d_k."""
    g = torch.Generator().manual_seed(seed)
    shapes = (2, 4, length, 6), (2, 2, length, 6), (2, 2, length, 5), (2, 4, length, 5), (2, 4, length)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)


def local_results(rank: int, ring: int, layout: str, name: str, length: int, dtype: torch.dtype, backend: str) -> Any:
    """out, lse, dq, dk, dv of one rank."""
    index = dense.parts(layout, ring, length)[rank]
    q, k, v, dout, dlse = (x[:, :, index].contiguous() for x in tensors(length, dtype))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    arguments = dict(case(name, length))
    if "document_ids" in arguments:
        arguments["document_ids"] = arguments["document_ids"][:, index]
    out, lse = longctx.ring_attention(
        q, k, v, mesh=ring_mesh(ring), layout=layout, return_lse=True, backend=backend, **arguments
    )
    objective = (out * dout).sum() + (lse.masked_fill(lse == -math.inf, 0.0) * dlse).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(objective, (q, k, v))


def worker(rank: int, world: int, length: int, dtype: torch.dtype, backend: str) -> Any:
    return {
        (layout, name): local_results(rank, world, layout, name, length, dtype, backend)
        for layout in ("contiguous", "zigzag", "striped")
        for name in CASES
    }


@pytest.mark.parametrize(
    ("ring", "backend", "dtype"),
    [
        *((ring, "aten", torch.float64) for ring in (1, 2, 3, 4)),
        (2, "reference", torch.float64),
        (4, "aten", torch.float32),
    ],
)
def test_equals_dense(ring: int, backend: str, dtype: torch.dtype) -> None:
    length = 24 * ring
    answers = run_ranks(ring, worker, length, dtype, backend)
    q, k, v, dout, dlse = tensors(length, dtype)
    for layout, name in answers[0]:
        order = torch.cat(dense.parts(layout, ring, length)).argsort()
        whole = [torch.cat([a[layout, name][i] for a in answers], 2)[:, :, order] for i in range(5)]
        arguments = case(name, length)
        ids = arguments.get("document_ids")
        rule = make_rule(arguments.get("causal", True), arguments.get("window"), arguments.get("length"))
        allowed = dense.visible(torch.arange(length), torch.arange(length), rule) & dense.same_document(ids, ids)
        expected = dense.attention(q, k, v, allowed, arguments.get("scale", 1 / math.sqrt(6)), dout, dlse)
        limit = tolerance("fp64" if dtype == torch.float64 else "fp32")
        assert dense.difference(dense.Results(*whole), expected) <= limit, (layout, name)


def count_worker(rank: int, world: int, layout: str, arguments: dict[str, Any]) -> Any:
    q, k, v, *_ = (x.requires_grad_() for x in tensors(8, torch.float32))
    counters.reset()
    out = longctx.ring_attention(q, k, v, mesh=ring_mesh(world), layout=layout, **arguments)
    forward = (counters.hops, counters.bytes)
    counters.reset()
    out.sum().backward()
    return forward, (counters.hops, counters.gradient_hops, counters.kv_bytes, counters.gradient_bytes, counters.bytes)


@pytest.mark.parametrize("ring", [1, 2, 3, 4])
def test_counters_equal_the_closed_forms(ring: int) -> None:
    """docs/methods/ring.md "Traffic": R - 1 blocks of K/V in each pass, R of dK/dV in backward, per rank."""
    block = 2 * 2 * 8 * (6 + 5) * 4
    for layout in ("zigzag", "striped"):
        for forward, backward in run_ranks(ring, count_worker, layout, {}):
            grads = ring if ring > 1 else 0
            assert forward == (ring - 1, (ring - 1) * block)
            assert backward == (ring - 1, grads, (ring - 1) * block, grads * block, (ring - 1 + grads) * block)


def freeze_worker(rank: int, world: int) -> Any:
    """Gradients with none of the inputs frozen, then each in turn."""
    results = []
    for frozen in (None, 0, 1, 2):
        inputs = tensors(8)[:3]
        for i, x in enumerate(inputs):
            x.requires_grad_(i != frozen)
        longctx.ring_attention(*inputs, mesh=ring_mesh(world)).square().sum().backward()
        results.append([x.grad for x in inputs])
    return results


def test_freezing_each_input_in_turn_neither_hangs_nor_changes_the_others() -> None:
    for free, *frozen in run_ranks(2, freeze_worker, timeout=60):
        for index, grads in enumerate(frozen):
            assert grads[index] is None
            assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(grads, free, strict=True)) if i != index)


def empty_worker(rank: int, world: int) -> Any:
    """Rank 1 has no label: it contributes 0 * sum(out), and its keys still get the other rank's gradient."""
    q, k, v, dout, _ = tensors(8)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = longctx.ring_attention(q, k, v, mesh=ring_mesh(world), causal=False)
    (out * dout * (1.0 if rank == 0 else 0.0)).sum().backward()
    return float(q.grad.abs().max()), float(k.grad.abs().max())


def test_a_shard_that_contributes_nothing_takes_part() -> None:
    (q0, k0), (q1, k1) = run_ranks(2, empty_worker, timeout=60)
    assert q0 > 0 and k0 > 0 and q1 == 0 and k1 > 0


def grid_worker(rank: int, world: int) -> Any:
    mesh = longctx.Mesh(ring=2, data=2)
    index = dense.parts("zigzag", 2, 32)[mesh.ring_rank]
    q, k, v, dout, _ = tensors(32, seed=mesh.data_rank)
    q, k, v = (x[:, :, index].contiguous().requires_grad_() for x in (q, k, v))
    out = longctx.ring_attention(q, k, v, mesh=mesh)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout[:, :, index])


def test_two_rings_side_by_side_keep_to_themselves() -> None:
    answers = run_ranks(4, grid_worker)
    order = torch.cat(dense.parts("zigzag", 2, 32)).argsort()
    index = torch.arange(32)
    for replica in range(2):
        got = [torch.cat(parts, 2)[:, :, order] for parts in zip(*answers[2 * replica : 2 * replica + 2], strict=True)]
        q, k, v, dout, _ = tensors(32, seed=replica)
        truth = dense.attention(q, k, v, dense.visible(index, index, make_rule(True, None)), 6**-0.5, dout)
        for a, b in zip(got, (truth.out, truth.dq, truth.dk, truth.dv), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance("fp64"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": longctx.Mesh(ulysses=5, world_size=5, rank=0)}, "at most ulysses=4"),
        ({"mesh": longctx.Mesh(ring=4, world_size=4, rank=0), "tokens": 3}, "multiple"),
        ({"mesh": longctx.Mesh(ring=4, world_size=4, rank=0), "length": 33}, "length"),
        ({"length": 0}, "length"),
        ({"layout": "spiral"}, "layout"),
        ({"keys": 9}, "one length"),
        ({"document_ids": torch.zeros(2, 8)}, "document_ids"),
        ({"softcap": -50.0}, "softcap"),
        ({"sink": torch.zeros(2)}, "sink"),
        ({"alibi": torch.zeros(4, dtype=torch.int32)}, "alibi"),
        ({"dropout_p": 0.5}, "dropout_seed"),
        ({"window": -1}, "window"),
    ],
)
def test_errors_name_what_is_wrong(change: dict[str, Any], message: str) -> None:
    tokens, keys = change.pop("tokens", 8), change.pop("keys", None)
    q, k, v, *_ = tensors(tokens)
    if keys is not None:
        _, k, v, *_ = tensors(keys)
    with pytest.raises(longctx.LongctxError, match=message):
        longctx.ring_attention(q, k, v, **change)


def one_tensor_worker(rank: int, world_size: int) -> float:
    mesh = longctx.Mesh(ring=world_size)
    torch.manual_seed(0)
    whole = torch.randn(1, 2, 8, 4, dtype=torch.float64)
    x = longctx.shard(whole, mesh, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(whole, whole, whole, is_causal=True)
    return float((longctx.ring_attention(x, x, x, mesh=mesh) - longctx.shard(expected, mesh, 2)).abs().max())


def test_keys_and_values_may_be_one_tensor() -> None:
    assert max(run_ranks(2, one_tensor_worker)) <= tolerance("fp64")
