"""Combining the states of stretches gives the state of all their tokens, however the tokens are split."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bounded import direct
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.bounded.ranks import monoid
from longctx.bounded.ranks.exchange import Value

from tolerances import tolerance

Write = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


def mean(s: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return s.logsumexp(0), (s.softmax(0)[..., None] * x).sum(0) if len(x) else x.sum(0)


def weighted_sum(s: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return s.abs().sum(0).log(), (s[..., None] * x).sum(0)


# What the tokens of one document leave: logits or weights s (n, G, M) and vectors x (n, G, M, D).
METHODS: dict[str, tuple[Callable[[Value, Value], Value], Write]] = {
    "add": (monoid.add, lambda s, x: (x.sum(0),)),
    "add_mass": (monoid.add_mass, lambda s, x: (s.logsumexp(0),)),
    "average": (monoid.average, mean),
    "total": (monoid.total, weighted_sum),
    "count": (monoid.add, lambda s, x: (torch.tensor(len(x)),)),
}


def state_of(write: Write, ids: list[list[int]], s: torch.Tensor, x: torch.Tensor) -> Value:
    """Return the state of some tokens: what each row's last document leaves, and which document that is."""
    rows, documents = [], []
    for row, names in enumerate(ids):
        valid = [t for t, name in enumerate(names) if name >= 0]
        last = names[valid[-1]] if valid else -1
        begin = len(valid)
        while begin and names[valid[begin - 1]] == last:
            begin -= 1
        rows.append(write(s[row, valid[begin:]], x[row, valid[begin:]]))
        documents.append(-2 - last if begin else last)  # it began within these tokens
    return *(torch.stack(parts) for parts in zip(*rows, strict=True)), torch.tensor(documents)


def same(ours: Value, theirs: Value) -> None:
    for a, b in zip(ours, theirs, strict=True):
        if a.is_floating_point():
            assert a.isfinite().equal(b.isfinite())
            a, b = (y.nan_to_num(neginf=0.0) for y in (a, b))
            assert direct.differences([a], [b])[0] <= tolerance("fp64")
        else:
            assert a.equal(b)


names = st.lists(st.integers(-1, 1), min_size=9, max_size=9)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=20)
@given(st.tuples(names, names), st.integers(0, 9), st.integers(0, 9), st.integers(0, 99))
def test_any_split_gives_the_state_of_the_whole(
    name: str, ids: tuple[list[int], list[int]], one: int, two: int, seed: int
) -> None:
    op, write = METHODS[name]
    g = torch.Generator().manual_seed(seed)
    s, x = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((2, 9, 1, 2), (2, 9, 1, 2, 3)))
    cuts = [slice(0, min(one, two)), slice(min(one, two), max(one, two)), slice(max(one, two), 9)]
    a, b, c = (state_of(write, [row[cut] for row in ids], s[:, cut], x[:, cut]) for cut in cuts)
    whole = state_of(write, list(ids), s, x)
    same(op(op(a, b), c), whole)
    same(op(a, op(b, c)), whole)
    nothing = monoid.identity(whole)
    same(op(nothing, whole), whole)
    same(op(whole, nothing), whole)


def test_marked_documents_keep_their_ids() -> None:
    documents = torch.tensor([-1, 0, 7])
    assert monoid.begun(documents).tolist() == [-1, -2, -9]
    assert monoid.name(monoid.begun(documents)).equal(documents) and monoid.name(documents).equal(documents)
