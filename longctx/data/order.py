"""The order of samples: a pure function of (seed, samples consumed), independent of ranks and workers.

Each epoch is a permutation with random access: a Feistel network over the next power of four, applied until the result
is inside the range (cycle walking). Nothing is stored, so the cost does not depend on the number of rows, and a run
resumes from one integer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from longctx.errors import DataError

_ROUNDS = 6
_MASK_64 = 2**64 - 1


class SampleOrder:
    """Maps sample n of a run to its row.

    Args:
        rows: rows of the data set.
        seed: any integer.
        shuffle: False gives rows 0, 1, 2, … again and again.

    Raises:
        DataError: there are no rows.
    """

    def __init__(self, rows: int, seed: int = 0, shuffle: bool = True) -> None:
        if rows < 1:
            raise DataError("no rows to order: the data set is empty; give more text or a smaller sequence_length")
        self.rows, self.seed, self.shuffle = rows, seed, shuffle

    def __call__(self, samples: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the rows of the given sample numbers (integers from 0, any shape; the result has that shape)."""
        samples = np.asarray(samples, dtype=np.int64)
        epochs, numbers = np.divmod(samples, self.rows)
        if not self.shuffle or self.rows == 1:
            return numbers
        result = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            result[inside] = permute(numbers[inside], self.rows, self.seed, int(epoch))
        return result

    def until_repeated(self) -> int:
        """Return how many samples can be taken before the second epoch begins."""
        return self.rows


def permute(numbers: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Apply the permutation of ``range(size)`` that (seed, epoch) names to ``numbers`` in that range, of any shape."""
    half = max(((size - 1).bit_length() + 1) // 2, 1)
    keys = _keys(seed, epoch)
    value = numbers.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while bool(outside.any()):  # the domain is at most 4·size, so few walks are needed
        value[outside] = _feistel(value[outside], half, keys)
        outside = value >= size
    return value.astype(np.int64)


def _feistel(value: npt.NDArray[np.uint64], half: int, keys: list[int]) -> npt.NDArray[np.uint64]:
    """A bijection of ``range(4 ** half)``."""
    shift, mask = np.uint64(half), np.uint64(2**half - 1)
    left, right = value >> shift, value & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ np.uint64(key)) & mask)
    return (left << shift) | right


def _keys(seed: int, epoch: int) -> list[int]:
    state = _mix_int(_mix_int(seed & _MASK_64) ^ (epoch * 0x9E3779B97F4A7C15 & _MASK_64))
    keys = []
    for _ in range(_ROUNDS):
        state = (state + 0x9E3779B97F4A7C15) & _MASK_64
        keys.append(_mix_int(state))
    return keys


def mix(z: Any) -> Any:
    """The finaliser of splitmix64, on arrays (uint64 wraps around): every bit in moves every bit out."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix_int(z: int) -> int:
    return int(mix(np.array([z], dtype=np.uint64))[0])
