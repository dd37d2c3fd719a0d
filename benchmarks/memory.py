"""The memory rows: peak bytes of ring attention per rank, against local and global length.

At fixed local length the peak must not depend on the number of ranks, from the smallest ring that uses every buffer on
(a block here, one arriving, one leaving: three ranks); at fixed ranks it is proportional to the local length.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.harness import Verdict, at_most, largest_peak
from benchmarks.registry import OURS, MemoryRow

HEADS, HEAD_DIM = 8, 64
ALL_BUFFERS = 3  # ranks: smaller rings have fewer blocks in flight


def worker(rank: int, ranks: int, rows: list[MemoryRow]) -> Iterator[dict[str, Any]]:
    """Measure rows one after another."""
    for row in rows:
        yield run_row(rank, row)


def run_row(rank: int, row: MemoryRow) -> dict[str, Any]:
    """Return the peak bytes of one forward + backward on the rank that needs most."""
    generator = torch.Generator().manual_seed(rank)
    local = tuple(torch.randn(1, HEADS, row.local, HEAD_DIM, generator=generator) for _ in range(4))
    step = OURS.load()
    step(*local)  # warm up: process groups, dispatcher caches
    gc.collect()
    peak = largest_peak(partial(step, *local))
    return {"row": asdict(row), "peak": peak, "peak_in_tensors": peak / local[0].nbytes}


def verdicts(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Require a peak that does not grow with the ranks, and grows in proportion to the local length."""
    peaks = {(entry["row"]["local"], entry["row"]["ranks"]): entry["peak"] for entry in rows}
    said = []
    for (local, ranks), peak in sorted(peaks.items()):
        if ranks >= ALL_BUFFERS and (doubled := peaks.get((local, 2 * ranks))) is not None:
            text = f"peak at {local} local tokens, {2 * ranks} ranks ÷ {ranks} ranks"
            said.append(at_most(text, doubled / peak, 1.01, digits=4))
        if (longer := peaks.get((2 * local, ranks))) is not None:
            text = f"peak at {ranks} ranks, {2 * local} ÷ {local} local tokens"
            said.append(at_most(text, longer / peak, 2.02, digits=4))
    return said
