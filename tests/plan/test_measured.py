"""The planner's peak against what ranks really hold during a training step (the profiler's bytes)."""

from __future__ import annotations

import pytest

from benchmarks.plan import CASES, LIMIT, SMALL, measured, predicted, ranks_of

from distributed import run_ranks


def peak(rank: int, world: int, case: str) -> int:
    return measured(case, world)


def check(case: str) -> None:
    ranks = ranks_of(case)
    (held, *_), (guess, moment) = run_ranks(ranks, peak, case, timeout=280), predicted(case)
    assert abs(guess / held - 1) <= LIMIT, f"{case}: {guess:,} predicted (at {moment}), {held:,} measured"


@pytest.mark.parametrize("case", SMALL)
def test_the_peak_of_a_small_run_is_within_ten_per_cent(case: str) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in SMALL])
def test_the_peak_of_a_run_is_within_ten_per_cent(case: str) -> None:
    check(case)
