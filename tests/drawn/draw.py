"""Draws from one integer seed, and the rows, layouts and tensors that all random cases share.

Nothing here uses the library: layouts and documents are implemented a second time.
"""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
LAYOUTS = ("contiguous", "zigzag", "striped")


class Draw:
    """Random choices determined by a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def pick(self, *choices: T) -> T:
        return self._random.choice(choices)

    def whole(self, low: int, high: int) -> int:
        """Return an integer from low to high, both included."""
        return self._random.randint(low, high)

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def sizes(self, total: int, parts: int) -> tuple[int, ...]:
        """Split `total` into up to `parts` pieces, none empty."""
        cuts = sorted({0, total, *(self.whole(0, total) for _ in range(parts - 1))})
        return tuple(b - a for a, b in zip(cuts, cuts[1:], strict=False))

    def row(self, length: int) -> tuple[int, ...]:
        """Return document ids of one row: runs, some of a repeated id, with padding between, within and around them."""
        found: list[int] = []
        for size in self.sizes(length, self.whole(1, 7)):
            found += [self.whole(0, 3)] * size
        for _ in range(self.whole(0, 3)):
            start = self.whole(0, length - 1)
            stop = min(start + self.whole(1, max(length // 4, 1)), length)
            found[start:stop] = [-1] * (stop - start)
        return tuple(found)


def seeds(default: int, deep: int) -> list[int]:
    """Return the seeds to run: LONGCTX_TEST_SEED only; with LONGCTX_TEST_RANDOM `deep` new ones; else the same few."""
    if "LONGCTX_TEST_SEED" in os.environ:
        return [int(os.environ["LONGCTX_TEST_SEED"])]
    if "LONGCTX_TEST_RANDOM" in os.environ:
        first = secrets.randbits(40)
        return list(range(first, first + deep))
    return list(range(default))


def compare(
    draw: Callable[[int], Any], check: Callable[[Any], tuple[float, float]], chosen: Sequence[int], where: str
) -> None:
    """Call `check(draw(seed))`, which returns (error, allowed), for every seed; name all that fail."""
    failed = []
    for seed in chosen:
        case = draw(seed)
        try:
            error, allowed = check(case)
            said = "" if error <= allowed else f"error {error:.2e}, allowed {allowed:.0e}"
        except Exception as problem:
            said = f"{type(problem).__name__}: {problem}"
        if said:
            failed.append(f"LONGCTX_TEST_SEED={seed} python -m pytest {where}\n    {said}\n    {case}")
    assert not failed, f"{len(failed)} of {len(chosen)} cases:\n" + "\n".join(failed)


def global_indices(layout: str, ring: int, length: int) -> list[list[int]]:
    """Return the global indices of every rank's tokens, in local order; `length` must be divisible."""
    if layout == "striped":
        return [list(range(rank, length, ring)) for rank in range(ring)]
    if layout == "contiguous" or ring == 1:
        part = length // ring
        return [list(range(rank * part, (rank + 1) * part)) for rank in range(ring)]
    part = length // (2 * ring)
    first, second = range(ring), range(2 * ring - 1, ring - 1, -1)
    return [
        [*range(a * part, (a + 1) * part), *range(b * part, (b + 1) * part)]
        for a, b in zip(first, second, strict=True)
    ]  # fmt: skip


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def worst(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest difference, relative to a tensor's largest value if above 1; infinities must agree."""
    error = 0.0
    for a, b in zip(found, expected, strict=True):
        a, b = a.detach().double(), b.detach()
        assert a.shape == b.shape and torch.equal(a == -torch.inf, b == -torch.inf)
        a, b = (x.masked_fill(x == -torch.inf, 0.0) for x in (a, b))
        apart = float((a - b).abs().max()) if a.numel() else 0.0
        error = max(error, apart / max(1.0, float(b.abs().max())) if apart == apart else float("inf"))
    return error
