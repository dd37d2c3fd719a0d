"""Which backend was measured fastest on a GPU like this one. Without a measurement there is no answer.

`make bench-gpu` measures the times after it has checked the results; `python -m benchmarks.gpu.table` copies them here.
Each row holds for one chip; none is used for another.
"""

from __future__ import annotations

import csv
from collections.abc import Collection
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("measured.csv")


class Call(NamedTuple):
    """What decides which backend is fastest, for tensors (batch, heads, length, head_dim). dtype: "bfloat16", say;
    head_dim: the larger of the two; group: query heads per key head."""

    dtype: str
    head_dim: int
    group: int
    causal: bool
    length: int


class Measured(NamedTuple):
    """One backend's milliseconds, forward and backward, on one chip."""

    chip: str
    call: Call
    backend: str
    milliseconds: float


@cache
def read(path: Path = TABLE) -> tuple[Measured, ...]:
    """Return the rows of a table; none if there is no such file."""
    if not path.exists():
        return ()
    with path.open(newline="") as file:
        return tuple(
            Measured(
                row["chip"],
                Call(row["dtype"], int(row["head_dim"]), int(row["group"]), row["causal"] == "1", int(row["length"])),
                row["backend"],
                float(row["milliseconds"]),
            )
            for row in csv.DictReader(file)
        )


def write(rows: Collection[Measured], path: Path = TABLE) -> None:
    """Overwrite the table."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("chip", *Call._fields, "backend", "milliseconds"))
        for chip, call, backend, milliseconds in sorted(rows):
            numbers = (int(x) if isinstance(x, bool) else x for x in call)
            writer.writerow((chip, *numbers, backend, f"{milliseconds:.4f}"))


@lru_cache(maxsize=1024)
def best(rows: tuple[Measured, ...], chip: str, call: Call, able: tuple[str, ...]) -> Measured | None:
    """Return the fastest of the `able` backends in the measured call nearest to this one; None if none was measured.

    Nearest: the same dtype and causality, the next larger head dimension, then the next smaller group and length (or
    the smallest, if this call's is below all).
    """
    near = [
        row
        for row in rows
        if row.chip == chip
        and (row.call.dtype, row.call.causal) == (call.dtype, call.causal)
        and row.call.head_dim >= call.head_dim
    ]
    for field, below in (("head_dim", False), ("group", True), ("length", True)):
        values = {getattr(row.call, field) for row in near}
        smaller = [value for value in values if value <= getattr(call, field)]
        chosen = max(smaller) if below and smaller else min(values, default=None)
        near = [row for row in near if getattr(row.call, field) == chosen]
    return min((row for row in near if row.backend in able), key=lambda row: row.milliseconds, default=None)
