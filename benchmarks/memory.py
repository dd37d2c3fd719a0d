"""The memory rows: what ring attention holds per rank, to the byte, against local and global length.

At fixed local length the peak may not depend on how many ranks share the sequence, from the smallest ring that uses
every buffer (a block here, one coming, one leaving: three ranks) on; at fixed ranks it is proportional to the local
length.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import peak_bytes
from benchmarks.registry import OURS, MemoryRow

HEADS, HEAD_DIM = 8, 64
ALL_BUFFERS = 3  # ranks: smaller rings have fewer blocks under way


def worker(rank: int, ranks: int, rows: list[MemoryRow]) -> Iterator[dict[str, Any]]:
    """Measure rows one after another."""
    for row in rows:
        yield run_row(rank, row)


def run_row(rank: int, row: MemoryRow) -> dict[str, Any]:
    """Peak bytes of one forward + backward on the largest rank."""
    generator = torch.Generator().manual_seed(rank)
    local = tuple(torch.randn(1, HEADS, row.local, HEAD_DIM, generator=generator) for _ in range(4))
    step = OURS.load()
    step(*local)  # first call: groups, caches of the dispatcher
    gc.collect()
    peak = torch.tensor([peak_bytes(lambda: step(*local))])
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    tensor_bytes = local[0].numel() * local[0].element_size()
    return {"row": asdict(row), "peak": int(peak), "peak_in_tensors": int(peak) / tensor_bytes}


def verdicts(rows: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """What the peaks must satisfy, each with whether it holds."""
    peaks = {(entry["row"]["local"], entry["row"]["ranks"]): entry["peak"] for entry in rows}
    said = []
    for (local, ranks), peak in sorted(peaks.items()):
        doubled = peaks.get((local, 2 * ranks))
        if ranks >= ALL_BUFFERS and doubled is not None:
            said.append(
                (
                    f"peak at {local} local tokens, {2 * ranks} ranks ÷ {ranks} ranks = {doubled / peak:.4f}, "
                    "required <= 1.01",
                    doubled <= 1.01 * peak,
                )
            )
        longer = peaks.get((2 * local, ranks))
        if longer is not None:
            said.append(
                (
                    f"peak at {ranks} ranks, {2 * local} ÷ {local} local tokens = {longer / peak:.4f}, "
                    "required <= 2.02",
                    longer <= 2.02 * peak,
                )
            )
    return said
