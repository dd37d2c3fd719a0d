"""Ulysses within groups and a ring across them, on simulated ranks: equal to dense attention, bytes as predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention import dense, extras
from attention.hybrid import simulated
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention.band import Rule, make_rule
from longctx.attention.heads import assign_heads
from longctx.layout import get_layout

from tolerances import tolerance

LAYOUTS = ("contiguous", "zigzag", "striped")
GRIDS = ((1, 2), (2, 2), (1, 4), (2, 3), (3, 2), (4, 2), (2, 5))
limits = st.one_of(st.none(), st.integers(0, 60))


def tensors(length: int, heads: tuple[int, int], seed: int, batch: int = 2) -> tuple[torch.Tensor, ...]:
    """q, k, v, dout, dlse in fp64; d_v != d_k."""
    g = torch.Generator().manual_seed(seed)
    h, kv = heads
    shapes = (batch, h, length, 6), (batch, kv, length, 6), (batch, kv, length, 3), (batch, h, length, 3)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) for shape in (*shapes, (batch, h, length)))


def expected(
    inputs: tuple[torch.Tensor, ...], rule: Rule, ids: torch.Tensor | None = None, more: dense.Extras = dense.PLAIN
) -> dense.Results:
    index = torch.arange(inputs[0].shape[2])
    allowed = dense.visible(index, index, rule) & dense.same_document(ids, ids)
    return dense.attention(*inputs[:3], allowed, 0.5, *inputs[3:], extras=more)


@settings(deadline=None, max_examples=40)
@given(
    layout=st.sampled_from(LAYOUTS),
    grid=st.sampled_from(GRIDS),
    tokens=st.integers(1, 150),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 5),
    rule=st.builds(Rule, limits, limits, st.one_of(st.none(), st.integers(1, 150))),
    documents=st.sampled_from([None, 1, 3, 20]),
    names=st.sampled_from([None, *extras.NAMES, extras.TOGETHER]),
    with_dlse=st.booleans(),
    lean=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_dense(
    layout: str,
    grid: tuple[int, int],
    tokens: int,
    kv_heads: int,
    group: int,
    rule: Rule,
    documents: int | None,
    names: str | None,
    with_dlse: bool,
    lean: bool,
    seed: int,
) -> None:
    """Any number of query heads from one a member up, any number of key heads below, at or above the members."""
    ring, ulysses = grid
    group = max(group, -(-ulysses // kv_heads))
    heads = (kv_heads * group, kv_heads)
    length = get_layout(layout).padded_length(tokens, ring, ulysses)
    inputs = tensors(length, heads, seed)[: 5 if with_dlse else 4]
    more = dense.PLAIN if names is None else extras.make(names, heads[0], 2, seed)
    ids = None
    if documents is not None:
        ids = torch.randint(-1, documents, (2, length), generator=torch.Generator().manual_seed(seed)).sort(1)[0]
    results, _ = simulated(ring, ulysses, layout, rule, inputs, ids, backend="auto", extras=more, lean=lean)
    assert dense.difference(results, expected(inputs, rule, ids, more)) <= tolerance("fp64")


@pytest.mark.parametrize(("ring", "ulysses", "heads"), [(1, 2, (4, 4)), (2, 2, (4, 2)), (1, 4, (8, 2)), (2, 4, (8, 1))])
def test_bytes_are_the_closed_form(ring: int, ulysses: int, heads: tuple[int, int]) -> None:
    """n tokens, h query heads, each of the U members sends what the others read of its own:
    q, k, v; out and lse; dout; the gradients. Keys of fewer heads than members are copied to those who read them."""
    n, (h, g), d, e = 32, heads, 8, 8
    gen = torch.Generator().manual_seed(0)
    shapes = ((1, h, n * ring * ulysses, d), (1, g, n * ring * ulysses, d), (1, g, n * ring * ulysses, d))
    inputs = tuple(torch.randn(s, generator=gen, dtype=torch.float64) for s in (*shapes, shapes[0]))
    results, counters = simulated(ring, ulysses, "zigzag", make_rule(True, None), inputs)
    assert dense.difference(results, expected(inputs, make_rule(True, None))) <= tolerance("fp64")
    shares = assign_heads(h, g, ulysses)
    for rank, c in enumerate(counters):
        mine, others = shares[rank % ulysses], [s for i, s in enumerate(shares) if i != rank % ulysses]
        queries, keys = sum(s.query_count for s in others), sum(s.key_count for s in others)
        away = n * (len(others))
        forward = n * d * (queries + 2 * keys) + away * mine.query_count * (d + 1)
        backward = n * d * queries + away * d * (mine.query_count + 2 * mine.key_count)
        assert c.exchanges == 4 and c.exchange_bytes == (forward + backward) * e
        if h % ulysses == 0 and g % ulysses == 0:  # docs/methods/ring.md "Ulysses within the ring", and lse
            assert forward + backward == 4 * (h + g) * n * d * (ulysses - 1) // ulysses + away * mine.query_count
        assert c.hops == 2 * (ring - 1) and c.kv_bytes == c.hops * 2 * mine.key_count * n * ulysses * d * e


def test_half_precision_copies_of_a_key_head_add_up_in_fp32() -> None:
    """One key head on four members: the error stays within twice that of a ring of one, against the fp64 truth."""
    inputs = tuple(x.bfloat16() for x in tensors(256, (8, 1), 3, batch=1)[:4])
    rule = make_rule(True, None)
    truth = expected(tuple(x.double() for x in inputs), rule)
    errors = []
    for grid in ((1, 1), (1, 4), (2, 2)):
        results, _ = simulated(*grid, "zigzag", rule, inputs)
        errors.append([float((a.double() - b).norm()) for a, b in zip(results, truth, strict=True)])
    for several in errors[1:]:
        assert all(a <= tolerance("bf16 ratio") * b for a, b in zip(several[:5], errors[0][:5], strict=True))


def test_a_window_and_documents_of_every_kind_on_a_large_grid() -> None:
    length = 8 * 16
    ids: Any = (torch.arange(length) * 5 // length)[None].expand(2, -1)
    inputs = tensors(length, (12, 3), 1)
    for rule in (make_rule(True, 9), make_rule(False, (5, 7)), make_rule(False, None)):
        results, _ = simulated(4, 4, "zigzag", rule, inputs, ids)
        assert dense.difference(results, expected(inputs, rule, ids)) <= tolerance("fp64")
