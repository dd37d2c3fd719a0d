"""The softmax merge is a commutative monoid, also where exponentials overflow and where nothing was seen."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention.merge import Partial, identity, merge

from tolerances import tolerance

lses = st.one_of(st.just(-math.inf), st.floats(-200, 200), st.floats(-2e4, 2e4))
partials = st.tuples(lses, st.floats(-3, 3)).map(lambda pair: partial(*pair))


def partial(lse: float, value: float, dtype: torch.dtype = torch.float64) -> Partial:
    """One row of two columns; a row that saw nothing has out 0."""
    seen = 0.0 if lse == -math.inf else value
    return torch.tensor([[seen, -seen]], dtype=dtype), torch.tensor([lse], dtype=dtype)


def close(a: Partial, b: Partial) -> bool:
    limit = tolerance("fp64")
    return torch.allclose(a[0], b[0], rtol=0, atol=limit) and torch.allclose(a[1], b[1], rtol=limit, atol=limit)


@settings(deadline=None, max_examples=200)
@given(partials, partials, partials)
def test_monoid_laws(a: Partial, b: Partial, c: Partial) -> None:
    nothing = identity((1, 2), torch.float64)
    assert close(merge(a, nothing), a) and close(merge(nothing, a), a)
    assert close(merge(a, b), merge(b, a))
    assert close(merge(merge(a, b), c), merge(a, merge(b, c)))


def test_nothing_and_nothing_is_nothing() -> None:
    out, lse = merge(identity((3, 2), torch.float32), identity((3, 2), torch.float32))
    assert torch.equal(out, torch.zeros(3, 2)) and torch.equal(lse, torch.full((3,), -math.inf))


@pytest.mark.parametrize("difference", [88.0, 89.0, 104.0, 1e4, 3e38])
def test_a_large_difference_neither_overflows_nor_vanishes(difference: float) -> None:
    small, large = partial(-1.0, 2.0, torch.float32), partial(-1.0 + difference, 3.0, torch.float32)
    for out, lse in (merge(small, large), merge(large, small)):
        assert torch.equal(out, large[0]) and torch.equal(lse, large[1])


def test_equals_one_softmax_over_both_sets() -> None:
    scores, values = torch.randn(4, 10, dtype=torch.float64) * 5, torch.randn(10, 3, dtype=torch.float64)
    halves = [
        (torch.softmax(scores[:, s], 1) @ values[s], torch.logsumexp(scores[:, s], 1)) for s in (slice(3), slice(3, 10))
    ]
    out, lse = merge(*halves)
    torch.testing.assert_close(out, torch.softmax(scores, 1) @ values, rtol=0, atol=tolerance("fp64"))
    torch.testing.assert_close(lse, torch.logsumexp(scores, 1), rtol=0, atol=tolerance("fp64"))


def test_half_precision_blocks_merge_into_fp32() -> None:
    from longctx.attention.merge import merge_

    out, lse = identity((2, 4), torch.float32)
    block = torch.randn(2, 4).bfloat16()
    merge_(out, lse, block, torch.zeros(2))
    assert torch.equal(out, block.float())
