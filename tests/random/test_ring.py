"""Ring attention over random cases equals its definition; a failing case names the seed that repeats it."""

from __future__ import annotations

import pytest
from drawn import draw, ring


def test_random_cases() -> None:
    draw.compare(ring.draw, ring.check, draw.seeds(60, 60), "tests/random/test_ring.py")


@pytest.mark.slow
def test_many_random_cases() -> None:
    draw.compare(ring.draw, ring.check, draw.seeds(400, 1000), "tests/random/test_ring.py")
