"""What the benchmark programs share: interleaved turns, sums over ranks, ratios, CSV files, verdicts."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from benchmarks import hardware
from benchmarks.measure import Sample, measure, peak_bytes

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
NOT_MEASURED = "not measured"
Verdict = tuple[str, bool]
"""A requirement with its figures, and whether it holds."""
T = TypeVar("T")


def turns(items: Iterable[T], count: int) -> Iterator[tuple[int, list[T]]]:
    """Yield (turn, items) `count` times, each turn starting with the next item, so that noise affects all alike."""
    order = list(items)
    for turn in range(count):
        shift = turn % max(len(order), 1)
        yield turn, order[shift:] + order[:shift]


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over turns of a ÷ b; turns that only one of them had are left out."""
    return median(a / b for a, b in zip(numerators, denominators, strict=False))


def spread(values: Sequence[float]) -> float:
    """Return (max − min) ÷ median."""
    return (max(values) - min(values)) / median(values)


def add_turn(call: Callable[[], Any] | None, result: Mapping[str, list[float]]) -> None:
    """Time `call` on all ranks at once (None: this rank idles) and append the turn's figures to `result`.

    "cpu": seconds summed over ranks. "wall": of the slowest rank. "blocked": the longest blocked time ÷ wall.
    """
    dist.barrier()
    sample = Sample(0.0, 0.0, 0.0) if call is None else measure(call)
    blocked = float("nan") if sample.blocked is None else sample.blocked
    cpus, walls, blocks = torch.tensor(gathered(sample.cpu, sample.wall, blocked), dtype=torch.float64).T
    result["cpu"].append(float(cpus.sum()))
    result["wall"].append(float(walls.max()))
    result["blocked"].append(float(blocks.max() / walls.max()))


def gathered(*values: float) -> list[list[float]]:
    """Return every rank's values."""
    own = torch.tensor(values, dtype=torch.float64)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    return [one.tolist() for one in every]


def largest(value: int) -> int:
    """Return the largest of all ranks' values."""
    return int(max(one for (one,) in gathered(value)))


def largest_peak(call: Callable[[], Any] | None) -> int:
    """Return the peak bytes of `call` on the rank that needs most (None: this rank idles)."""
    return largest(0 if call is None else peak_bytes(call))


def origin() -> dict[str, str]:
    """Return what a row was measured on."""
    return {"hardware": hardware.describe(), "load": f"{hardware.load():.2f}", "commit": hardware.commit()}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], *, append: bool = False) -> None:
    """Write rows with the columns of all of them, in their order; what a row lacks is left empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append = append and path.exists()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("a" if append else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if not append:
            writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def at_most(text: str, value: float, limit: float, digits: int = 3) -> Verdict:
    """Return the verdict on a value that must not exceed the limit."""
    return f"{text} = {value:.{digits}f}, required <= {limit:.{digits}g}", value <= limit


def at_least(text: str, value: float, limit: float, digits: int = 3) -> Verdict:
    """Return the verdict on a value that must reach the limit."""
    return f"{text} = {value:.{digits}f}, required >= {limit:.{digits}g}", value >= limit


def judge(verdicts: Iterable[Verdict]) -> bool:
    """Print verdicts; return whether all of them hold."""
    verdicts = list(verdicts)
    for text, holds in verdicts:
        print(("ok      " if holds else "MISSED  ") + text)
    return all(holds for _, holds in verdicts)
