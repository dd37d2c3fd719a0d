"""Ring attention over random cases equals its definition; a failing case names the seed that repeats it."""

from __future__ import annotations

from typing import Any

import pytest
from drawn import draw, ring

from distributed import run_ranks


def test_random_cases() -> None:
    draw.compare(ring.draw, ring.check, draw.seeds(60, 60), "tests/random/test_ring.py")


@pytest.mark.slow
def test_many_random_cases() -> None:
    draw.compare(ring.draw, ring.check, draw.seeds(400, 1000), "tests/random/test_ring.py")


def on_two_ranks(rank: int, world: int, chosen: list[int]) -> list[Any]:
    import longctx

    mesh = longctx.Mesh(ring=world)
    return [ring.of_rank(ring.draw(seed), mesh) for seed in chosen]


def test_random_cases_on_two_ranks() -> None:
    """The public function over processes: the same cases where a ring has two ranks."""
    chosen = [seed for seed in draw.seeds(60, 60) if alone(ring.draw(seed))]
    answers = dict(zip(chosen, zip(*run_ranks(2, on_two_ranks, chosen), strict=True), strict=True))

    def check(case: ring.RingCase) -> tuple[float, float]:
        return ring.compared(case, ring.assembled(case, answers[case.seed]))

    draw.compare(ring.draw, check, chosen, "tests/random/test_ring.py")


def alone(case: ring.RingCase) -> bool:
    """Whether it is a ring of two."""
    return case.ring == 2
