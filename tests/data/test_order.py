"""The order of samples is a permutation an epoch, with random access, decided by the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.order import SampleOrder
from longctx.errors import DataError


@pytest.mark.parametrize("rows", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4097])
def test_an_epoch_is_a_permutation(rows: int) -> None:
    order = SampleOrder(rows, seed=3)
    for epoch in range(3):
        assert sorted(order(np.arange(epoch * rows, (epoch + 1) * rows)).tolist()) == list(range(rows))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**15), st.integers(-(2**70), 2**70), st.lists(st.integers(0, 10**15), min_size=1, max_size=50))
def test_random_access(rows: int, seed: int, samples: list[int]) -> None:
    order = SampleOrder(rows, seed)
    together = order(np.array(samples))
    assert ((together >= 0) & (together < rows)).all()
    assert together.tolist() == [int(order(sample)) for sample in samples]
    inside = {sample: row for sample, row in zip(samples, together.tolist(), strict=True) if sample < rows}
    assert len(set(inside.values())) == len(inside)


def test_epochs_and_seeds_differ() -> None:
    first, second = SampleOrder(1000, 0)(np.arange(2000)).reshape(2, 1000)
    other = SampleOrder(1000, 1)(np.arange(1000))
    for one, two in ((first, second), (first, other)):
        assert (one == two).sum() < 10  # two random permutations agree in about one place


def test_it_looks_random() -> None:
    """Chi-square over (eighth of the epoch, eighth of the file): 49 degrees of freedom, 100 is four sigma off."""
    rows = 80_000
    places = SampleOrder(rows, 7)(np.arange(rows))
    table = np.histogram2d(np.arange(rows), places, bins=8)[0]
    assert ((table - 1250) ** 2 / 1250).sum() < 100
    steps = np.diff(places)  # neighbours in the order are not neighbours in the file
    assert (np.abs(steps) < rows // 100).mean() < 0.03


def test_fixed_for_ever() -> None:
    """A resumed run must find the order it began with: these numbers may never change."""
    assert SampleOrder(10, 0)(np.arange(20)).tolist() == FIRST_TWENTY
    assert SampleOrder(10, 0, shuffle=False)(np.arange(12)).tolist() == [*range(10), 0, 1]


FIRST_TWENTY = [7, 5, 1, 8, 6, 3, 4, 0, 9, 2, 9, 4, 6, 8, 7, 3, 1, 5, 2, 0]


def test_no_rows() -> None:
    with pytest.raises(DataError, match="data set is empty"):
        SampleOrder(0)
