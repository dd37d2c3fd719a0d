"""ring_attention in real gloo processes against dense fp64 attention: forward, backward, every mask and layout."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from attention import dense
from distributed import run_ranks
from tolerances import tolerance

import longctx
from longctx.attention.band import make_rule
from longctx.attention.comm import counters
from longctx.layout import get_layout


@lru_cache(maxsize=None)
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


CASES = ("causal", "full", "window", "two-sided window", "documents", "full documents", "short", "full short", "everything")


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


@pytest.mark.parametrize("ring", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("aten", torch.float64), ("aten", torch.float32), ("reference", torch.float64)]
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
    """methods.md 4.3: (R-1) 2bc h_kv d e forward, the same and R 2bc h_kv d e_a backward, per rank."""
    block = 2 * 2 * 8 * (6 + 5) * 4
    for layout in ("zigzag", "striped"):
        for forward, backward in run_ranks(ring, count_worker, layout, {}):
            grads = ring if ring > 1 else 0
            assert forward == (ring - 1, (ring - 1) * block)
            assert backward == (ring - 1, grads, (ring - 1) * block, grads * block, (ring - 1 + grads) * block)


def freeze_worker(rank: int, world: int) -> Any:
    results = []
    for frozen in range(3):
        inputs = list(tensors(8)[:3])
        for i, x in enumerate(inputs):
            x.requires_grad_(i != frozen)
        longctx.ring_attention(*inputs, mesh=ring_mesh(world)).square().sum().backward()
        results.append([x.grad for x in inputs])
    return results


def test_freezing_each_input_in_turn_neither_hangs_nor_changes_the_others() -> None:
    for results in run_ranks(2, freeze_worker, timeout=60):
        for frozen in range(3):
            for i in range(3):
                if i == frozen:
                    assert results[frozen][i] is None
                else:
                    assert torch.equal(results[frozen][i], results[(i + 1) % 3 if (i + 1) % 3 != frozen else (i + 2) % 3][i])


def uneven_worker(rank: int, world: int) -> Any:
    """Only one rank's keys want a gradient; the others still take part, since somebody's output depends on them."""
    q, k, v = (x.requires_grad_() for x in tensors(8)[:3])
    longctx.ring_attention(q, k, v, mesh=ring_mesh(world)).mul(0.0).sum().backward()
    return float(k.grad.abs().max())


def test_a_shard_that_contributes_nothing_takes_part() -> None:
    assert run_ranks(2, uneven_worker, timeout=60) == [0.0, 0.0]


def test_padded_length_of_every_layout_is_accepted() -> None:
    for layout in ("contiguous", "zigzag", "striped"):
        assert get_layout(layout).padded_length(24, 4) % get_layout(layout).multiple(4) == 0
