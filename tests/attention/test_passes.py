"""Rings of up to 64 simulated ranks, running the real passes, against dense attention and the closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention import dense
from attention.ring import simulated
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention.backends.base import BackwardQueries
from longctx.attention.backends.choose import choose_backend
from longctx.attention.band import Rule, make_rule
from longctx.attention.comm import LoopbackLink
from longctx.attention.passes import Passes, split
from longctx.attention.schedule import make_schedule
from longctx.attention.scores import Scores
from longctx.layout import get_layout

from tolerances import tolerance

LAYOUTS = ("contiguous", "zigzag", "striped")
limits = st.one_of(st.none(), st.integers(0, 90))


def tensors(
    length: int, heads: tuple[int, int], dims: tuple[int, int], seed: int, batch: int = 1
) -> tuple[torch.Tensor, ...]:
    """q, k, v, dout, dlse in fp64."""
    g = torch.Generator().manual_seed(seed)
    (h, kv), (d_k, d_v) = heads, dims
    shapes = (batch, h, length, d_k), (batch, kv, length, d_k), (batch, kv, length, d_v), (batch, h, length, d_v)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) for shape in (*shapes, (batch, h, length)))


def expected(
    inputs: tuple[torch.Tensor, ...], rule: Rule, ids: torch.Tensor | None = None, scale: float = 0.5
) -> dense.Results:
    index = torch.arange(inputs[0].shape[2])
    return dense.attention(
        *inputs[:3], dense.visible(index, index, rule) & dense.same_document(ids, ids), scale, *inputs[3:]
    )


@settings(deadline=None, max_examples=50)
@given(
    layout=st.sampled_from(LAYOUTS),
    ring=st.integers(1, 8),
    tokens=st.integers(1, 300),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    dims=st.sampled_from([(8, 8), (6, 3), (3, 7)]),
    rule=st.builds(Rule, limits, limits, st.one_of(st.none(), st.integers(1, 250))),
    documents=st.sampled_from([None, 1, 3, 50]),
    with_dlse=st.booleans(),
    backend=st.sampled_from(["aten", "reference"]),
    seed=st.integers(0, 2**31),
)
def test_equals_dense(
    layout: str,
    ring: int,
    tokens: int,
    heads: Any,
    dims: Any,
    rule: Rule,
    documents: Any,
    with_dlse: bool,
    backend: str,
    seed: int,
) -> None:
    length = get_layout(layout).padded_length(tokens, ring)
    inputs = tensors(length, heads, dims, seed, batch=2)[: 5 if with_dlse else 4]
    ids = None
    if documents is not None:
        ids = torch.randint(-1, documents, (2, length), generator=torch.Generator().manual_seed(seed)).sort(1)[0]
    results, _ = simulated(ring, layout, rule, inputs, ids, backend=backend)
    assert dense.difference(results, expected(inputs, rule, ids)) <= tolerance("fp64")


@pytest.mark.parametrize(
    ("layout", "ring"),
    [
        ("contiguous", 16), ("striped", 16), ("zigzag", 16), ("zigzag", 32),
        pytest.param("zigzag", 64, marks=pytest.mark.deep),
    ],
)  # fmt: skip
def test_large_rings_equal_dense_and_send_the_closed_form(layout: str, ring: int) -> None:
    length, rule = 4 * ring, make_rule(layout != "contiguous", None)
    ids = (torch.arange(length) * 5 // length)[None].int()
    inputs = tensors(length, (2, 1), (4, 4), ring)
    results, counters = simulated(ring, layout, rule, inputs, ids)
    assert dense.difference(results, expected(inputs, rule, ids)) <= tolerance("fp64")
    block, documents = 4 * (4 + 4) * 8, 4 * 4
    for c in counters:  # one message a hop, but for a block's first: keys, values and ids where they lie
        assert c.hops == 2 * (ring - 1) and c.gradient_hops == ring and c.messages == 3 * ring - 2 + 2 * 2
        assert c.kv_bytes == 2 * (ring - 1) * block and c.gradient_bytes == ring * block
        assert c.document_bytes == 2 * (ring - 1) * documents
        assert c.bytes == c.kv_bytes + c.gradient_bytes + c.document_bytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_window_sends_only_what_it_reaches(layout: str) -> None:
    ring, length, rule = 16, 256, make_rule(True, 9)
    inputs = tensors(length, (1, 1), (4, 4), 0)
    results, counters = simulated(ring, layout, rule, inputs)
    assert dense.difference(results, expected(inputs, rule)) <= tolerance("fp64")
    schedule = make_schedule(layout, ring, length, rule)
    assert sum(c.hops for c in counters) == 2 * schedule.hops
    assert sum(c.gradient_hops for c in counters) == schedule.gradient_hops
    if layout != "striped":  # a stripe's neighbours are on other ranks: 8 hops; chunks reach their neighbours only
        assert max(c.hops for c in counters) <= 4


def test_half_precision_gradients_travel_in_fp32() -> None:
    inputs = tuple(x.bfloat16() for x in tensors(64, (2, 2), (8, 8), 0)[:4])
    _, counters = simulated(4, "zigzag", make_rule(True, None), inputs)
    assert all(c.kv_bytes == 6 * 2 * 2 * 16 * 8 * 2 and c.gradient_bytes == 4 * 2 * 2 * 16 * 8 * 4 for c in counters)


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("causal", [True, False])
def test_bf16_error_is_at_most_twice_one_devices(causal: bool, backend: str) -> None:
    """Against the fp64 truth of the same rounded inputs; root mean square and largest error, rings 1 to 8."""
    inputs = tuple(x.bfloat16() for x in tensors(1024, (4, 2), (64, 64), 3)[:4])
    rule = make_rule(causal, None)
    truth = expected(tuple(x.double() for x in inputs), rule, scale=0.125)
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.125, enable_gqa=True)
    single = (out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3]))
    true = (truth.out, truth.dq, truth.dk, truth.dv)
    for ring in (1, 2, 4, 8):
        results, _ = simulated(ring, "zigzag", rule, inputs, scale=0.125, backend=backend)
        ours = (results.out, results.dq, results.dk, results.dv)
        for a, b, t in zip(ours, single, true, strict=True):
            for norm in (2, math.inf):
                error = torch.linalg.vector_norm(a.double() - t, norm)
                assert error <= tolerance("bf16 ratio") * torch.linalg.vector_norm(b.double() - t, norm), (ring, norm)


def test_fp32_on_eight_ranks() -> None:
    inputs = tuple(x.float() for x in tensors(2048, (2, 1), (32, 32), 1)[:4])
    results, _ = simulated(8, "zigzag", make_rule(True, None), inputs, scale=32**-0.5)
    truth = expected(inputs, make_rule(True, None), scale=32**-0.5)
    assert dense.difference(results, truth) <= tolerance("fp32")


def test_two_runs_are_equal_to_the_bit() -> None:
    inputs = tuple(x.float() for x in tensors(512, (2, 1), (8, 8), 1))
    first, second = (simulated(4, "zigzag", make_rule(True, None), inputs)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_logits_of_ten_thousand_over_a_ring() -> None:
    inputs = tensors(128, (1, 1), (8, 8), 2)
    unit = tuple(x / x.norm(dim=-1, keepdim=True) for x in inputs[:2])
    results, _ = simulated(4, "zigzag", make_rule(True, None), (*unit, *inputs[2:]), scale=1e4)
    truth = expected((*unit, *inputs[2:]), make_rule(True, None), scale=1e4)
    for got, true in zip(results, truth, strict=True):
        assert (got - true).abs().max() <= tolerance("fp64") * true.abs().max().clamp(min=1)


@pytest.mark.parametrize("ring", [2, 5])
def test_loopback_is_a_ring_of_equal_members(ring: int) -> None:
    """One process sends to itself: full attention over `ring` copies of the same local tokens."""
    inputs = tensors(24, (2, 1), (4, 4), 0)
    scores = Scores(0.5)
    q, k, v, dout, dlse = inputs
    passes = Passes(LoopbackLink(ring), "contiguous", Rule(), scores, choose_backend("auto", q, v, scores))
    out, lse = passes.forward(q, k, v, None)
    dq, dkv, _ = passes.backward(BackwardQueries(q, out, lse, dout, dlse), k, v, None)
    dk, dv = split(dkv, k, v)
    copies = (q, k.repeat(1, 1, ring, 1), v.repeat(1, 1, ring, 1), dout, dlse)
    truth = dense.attention(*copies[:3], torch.ones(1, 1, 24, 24 * ring, dtype=torch.bool), 0.5, dout, dlse)
    folded = (x.unflatten(2, (ring, 24)).sum(2) for x in (truth.dk, truth.dv))
    assert dense.difference(dense.Results(out, lse, dq, dk, dv), dense.Results(*truth[:3], *folded)) <= tolerance(
        "fp64"
    )
