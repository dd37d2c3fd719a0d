"""The engine's step on ranks equals that of one process, over random windows and settings; a failure names its seed."""

from __future__ import annotations

import functools

import pytest
from drawn import draw, engine
from engine_tiny import run_ranks

WHERE = "tests/random/test_engine.py"


def check_all(rank: int, world: int, chosen: list[int]) -> str:
    """Check every case on every rank; return this rank's failures."""
    drawn = functools.partial(engine.draw, world=world)
    try:
        draw.compare(drawn, engine.check, chosen, WHERE)
    except AssertionError as error:
        return str(error)
    return ""


def test_random_windows_on_two_ranks() -> None:
    assert run_ranks(2, check_all, draw.seeds(4, 4), timeout=280) == ["", ""]


@pytest.mark.slow
def test_many_random_windows() -> None:
    assert run_ranks(2, check_all, draw.seeds(60, 100), timeout=2000) == ["", ""]


@pytest.mark.slow
def test_random_windows_on_four_ranks() -> None:
    assert run_ranks(4, check_all, draw.seeds(20, 40), timeout=2000) == [""] * 4
