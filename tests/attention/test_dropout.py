"""Attention dropout is a function of (seed, head, query, key) and of nothing else; and it drops what it says."""

from __future__ import annotations

import pytest
import torch
from attention import dense
from attention.ring import simulated
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx import block_attention, ring_attention
from longctx.attention.arguments import resolve_seeds
from longctx.attention.band import Rule
from longctx.kernels.flash import dropout

from tolerances import tolerance

SEEDS = torch.tensor([0, -1, 2**62 + 12345])


@settings(deadline=None, max_examples=30)
@given(
    seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3),
    heads=st.integers(1, 5),
    start=st.integers(0, 2**31),
    p=st.floats(0.01, 0.99),
)
def test_the_hash_is_that_of_unsigned_arithmetic(seeds: list[int], heads: int, start: int, p: float) -> None:
    queries, keys = torch.arange(start, start + 7), torch.arange(0, 50, 3)
    ours = dropout.kept(torch.tensor(seeds), heads, queries, keys, p)
    assert torch.equal(ours, dense.kept(torch.tensor(seeds), heads, queries, keys, p))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_rate_is_right_everywhere_and_draws_are_unrelated(p: float) -> None:
    size, heads = 256, 4
    index = torch.arange(size)
    kept = dropout.kept(SEEDS, heads, index, index, p).double()
    spread = (p * (1 - p)) ** 0.5
    for dims in ((0, 1, 2, 3), (2, 3), (1, 2, 3), (0, 1, 2), (0, 1, 3)):  # all, per head, per seed, per key, per query
        mean = kept.mean(dims)
        draws = kept.numel() / max(mean.numel(), 1)
        assert float((mean - (1 - p)).abs().max()) <= 5 * spread / draws**0.5
    centred = (kept - (1 - p)) / spread
    neighbours = {
        "keys": (centred[..., 1:], centred[..., :-1]),
        "queries": (centred[:, :, 1:], centred[:, :, :-1]),
        "heads": (centred[:, 1:], centred[:, :-1]),
        "rows": (centred[1:], centred[:-1]),
        "mirrored": (centred, centred.mT),
    }
    for name, (a, b) in neighbours.items():
        assert abs(float((a * b).mean())) <= 6 / a.numel() ** 0.5, name


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_every_ring_keeps_the_same_probabilities(layout: str) -> None:
    """With the identity as values, the output is the dropped probabilities themselves."""
    length, heads = 48, 2
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(3, heads, length, 4, generator=g, dtype=torch.float64) for _ in range(2))
    v = torch.eye(length, dtype=torch.float64).expand(3, heads, length, length).contiguous()
    extras = dense.Extras(dropout_p=0.3, seeds=SEEDS)
    index = torch.arange(length)
    expected = dense.kept(SEEDS, heads, index, index, 0.3)
    for ring in (1, 2, 3, 4, 8):
        results, _ = simulated(ring, layout, Rule(), (q, k, v, v), backend="reference", extras=extras)
        assert torch.equal(results.out != 0, expected), ring


def test_the_expectation_is_attention_without_dropout() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 4, generator=g, dtype=torch.float64) for _ in range(3))
    draws = 4000
    out, lse = block_attention(*(x.expand(draws, -1, -1, -1) for x in (q, k, v)), dropout_p=0.25, dropout_seed=7)
    truth, plain = block_attention(q, k, v)
    assert float((lse - plain).abs().max()) <= tolerance("fp64"), "the lse is that of the undropped softmax"
    error = (out.mean(0) - truth[0]).abs() / (out.std(0) / draws**0.5 + 1e-12)
    assert float(error.max()) <= 5, "more than five standard errors from the mean"


def test_seeds() -> None:
    q = torch.randn(3, 2, 8, 4)
    same = [ring_attention(q, q, q, dropout_p=0.5, dropout_seed=5) for _ in range(2)]
    other = ring_attention(q, q, q, dropout_p=0.5, dropout_seed=6)
    assert torch.equal(*same) and not torch.equal(same[0], other)
    seeds = resolve_seeds(q, 0.5, 5)
    assert seeds is not None and len(set(seeds.tolist())) == 3, "every row has its own"
    assert torch.equal(same[0], ring_attention(q, q, q, dropout_p=0.5, dropout_seed=seeds))
    for extreme in (-1, 2**63, 2**200, -(2**63)):
        ring_attention(q, q, q, dropout_p=0.5, dropout_seed=extreme)
    assert torch.equal(ring_attention(q, q, q, dropout_seed=3), ring_attention(q, q, q)), "nothing is dropped at p = 0"
