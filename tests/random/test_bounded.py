"""ABC, its queues and Cottention over random cases equal their definitions; a failing case names its seed."""

from __future__ import annotations

from typing import Any

import pytest
from drawn import bounded, draw

from distributed import run_ranks


def test_random_cases() -> None:
    draw.compare(bounded.draw, bounded.check, draw.seeds(60, 60), "tests/random/test_bounded.py")


@pytest.mark.slow
def test_many_random_cases() -> None:
    draw.compare(bounded.draw, bounded.check, draw.seeds(400, 1000), "tests/random/test_bounded.py")


def on_two_ranks(rank: int, world: int, chosen: list[int]) -> list[Any]:
    import longctx

    mesh = longctx.Mesh(ring=world)
    return [bounded.of_rank(bounded.draw(seed), mesh) for seed in chosen]


def test_random_cases_on_two_ranks() -> None:
    """The public function over processes: the same cases where a ring has two ranks."""
    chosen = [seed for seed in draw.seeds(60, 60) if alone(bounded.draw(seed))]
    answers = dict(zip(chosen, zip(*run_ranks(2, on_two_ranks, chosen), strict=True), strict=True))

    def check(case: bounded.BoundedCase) -> tuple[float, float]:
        return bounded.compared(case, bounded.assembled(case, answers[case.seed]))

    draw.compare(bounded.draw, check, chosen, "tests/random/test_bounded.py")


def alone(case: bounded.BoundedCase) -> bool:
    """Whether it is a ring of two."""
    return len(case.rings) == 1 and case.rings[0][1] == 2
