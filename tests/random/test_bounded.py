"""ABC, its queues and Cottention over random cases equal their definitions; a failing case names its seed."""

from __future__ import annotations

import pytest
from drawn import bounded, draw


def test_random_cases() -> None:
    draw.compare(bounded.draw, bounded.check, draw.seeds(60, 60), "tests/random/test_bounded.py")


@pytest.mark.slow
def test_many_random_cases() -> None:
    draw.compare(bounded.draw, bounded.check, draw.seeds(400, 1000), "tests/random/test_bounded.py")
