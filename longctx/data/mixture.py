"""The order of samples of several sources by weight: a pure function of (seed, sample), like order.py.

A table of 4,096 samples gives every source its share, spread as evenly as integers allow; it repeats for ever. Samples
are shuffled inside blocks of 32, so in any number of samples a source has its share to within one block. Sample k of a
source is row ``SampleOrder(rows)(k)`` of it: every row once per epoch of that source.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from longctx.data.order import SampleOrder, permute
from longctx.errors import DataError

PERIOD = 4096
_BLOCK = 32
_NEXT_SEED = 0x9E3779B97F4A7C15
Int64 = npt.NDArray[np.int64]


class MixedOrder:
    """Maps sample n of a run to its row, among the rows of all sources one after another.

    Args:
        rows: number of rows of each source.
        weights: share of each source in the samples, in any unit.
        seed: any integer.
        shuffle: False: no shuffling in blocks, and rows of a source in order.

    Raises:
        DataError: not one positive weight per source, a share below 1/4,096, or a source without rows.
    """

    def __init__(self, rows: Sequence[int], weights: Sequence[float], seed: int = 0, shuffle: bool = True) -> None:
        shares = np.asarray(weights, np.float64)
        if shares.size != len(rows) or not np.isfinite(shares).all() or (shares <= 0).any():
            raise DataError(
                f"data.weights {list(weights)}: give one positive number for each of the {len(rows)} sources"
            )
        shares = shares / shares.sum()
        if shares.min() * PERIOD < 1:
            raise DataError(
                f"data.weights {list(weights)}: the share of a source is below 1/{PERIOD}; raise it, or leave it out"
            )
        self.seed, self.shuffle, self.rows = seed, shuffle, int(sum(rows))
        self._first_rows = np.cumsum([0, *rows])
        self._orders = [SampleOrder(count, seed + number * _NEXT_SEED, shuffle) for number, count in enumerate(rows)]
        self._table = _table(shares)
        before = np.cumsum(self._table[:, None] == np.arange(len(rows)), axis=0)
        self._before = np.concatenate([np.zeros((1, len(rows)), np.int64), before])  # (PERIOD + 1, sources)

    def __call__(self, samples: npt.ArrayLike) -> Int64:
        """Return the rows of the given sample numbers (integers from 0, any shape; the result has that shape)."""
        source, number = self.places(samples)
        result = np.empty_like(number)
        for index, order in enumerate(self._orders):
            here = source == index
            result[here] = self._first_rows[index] + order(number[here])
        return result

    def places(self, samples: npt.ArrayLike) -> tuple[Int64, Int64]:
        """Return the source of each sample, and how many samples of that source come before it in the table."""
        samples = np.asarray(samples, np.int64)
        if self.shuffle:
            blocks, inside = np.divmod(samples, _BLOCK)
            samples = samples.copy()
            for block in np.unique(blocks):
                here = blocks == block
                samples[here] = block * _BLOCK + permute(inside[here], _BLOCK, self.seed, int(block))
        period, place = np.divmod(samples, PERIOD)
        source = self._table[place]
        return source, period * self._before[-1][source] + self._before[place, source]

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first ``samples`` samples are of each source."""
        whole = samples // _BLOCK * _BLOCK
        period, place = divmod(whole, PERIOD)
        rest, _ = self.places(np.arange(whole, samples))
        counts = period * self._before[-1] + self._before[place] + np.bincount(rest, minlength=len(self._orders))
        return [int(count) for count in counts]

    def until_repeated(self) -> int:
        """Return how many samples can be taken before any source begins a second epoch."""
        low, high = 0, PERIOD * (1 + max(order.rows for order in self._orders))
        while low < high:  # the largest number of samples whose counts all fit
            middle = (low + high + 1) // 2
            fits = all(n <= order.rows for n, order in zip(self.counts(middle), self._orders, strict=True))
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def _table(shares: npt.NDArray[np.float64]) -> Int64:
    """Return the source of each of ``PERIOD`` samples: always the one that is furthest behind its share."""
    table, done = np.empty(PERIOD, np.int64), np.zeros(shares.size)
    for place in range(PERIOD):
        table[place] = source = int(np.argmax(shares * (place + 1) - done))
        done[source] += 1
    return table
