"""Ring attention, ABC, its queues and Cottention equal their definitions in random cases; a failure names its seed."""

from __future__ import annotations

from typing import Any

import pytest
from drawn import bounded, draw, ring

from distributed import run_ranks

CASES: dict[str, Any] = {"ring": ring, "bounded": bounded}
each = pytest.mark.parametrize("name", CASES)


def where(name: str) -> str:
    return f"tests/random/test_operators.py -k {name}"


@each
def test_random_cases(name: str) -> None:
    draw.compare(CASES[name].draw, CASES[name].check, draw.seeds(60, 60), where(name))


@pytest.mark.slow
@each
def test_many_random_cases(name: str) -> None:
    draw.compare(CASES[name].draw, CASES[name].check, draw.seeds(400, 1000), where(name))


def on_two_ranks(rank: int, world: int, name: str, chosen: list[int]) -> list[Any]:
    import longctx

    mesh = longctx.Mesh(ring=world)
    return [CASES[name].of_rank(CASES[name].draw(seed), mesh) for seed in chosen]


@each
def test_random_cases_on_two_ranks(name: str) -> None:
    """Run the cases whose ring has two ranks through the public functions, on two processes."""
    cases = CASES[name]
    chosen = [seed for seed in draw.seeds(60, 60) if cases.has_two_ranks(cases.draw(seed))]
    answers = dict(zip(chosen, zip(*run_ranks(2, on_two_ranks, name, chosen), strict=True), strict=True))

    def check(case: Any) -> tuple[float, float]:
        return cases.compared(case, cases.assembled(case, answers[case.seed]))

    draw.compare(cases.draw, check, chosen, where(name))
