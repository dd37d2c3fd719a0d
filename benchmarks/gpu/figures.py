"""What decode.py and loss.py have in common: rows of contestants, a figure each, a table that grows."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware
from benchmarks.peers import NotMeasured

OURS = "longctx"


@dataclass
class Figure:
    """One contestant in one row: seconds, and bytes of what the table says, or why there are none."""

    row: Any
    contestant: str
    seconds: float | None = None
    bytes: int | None = None
    note: str = ""
    wrong: bool = False


def run(
    rows: Sequence[Any],
    contestants: Iterable[str],
    measure: Callable[[Figure], None],
    describe: Callable[[Any, list[Figure]], str],
) -> list[Figure]:
    """Measure every contestant in every row; print a line a row."""
    figures: list[Figure] = []
    for row in rows:
        measured = [_measure(Figure(row, name), measure) for name in contestants]
        print(describe(row, [figure for figure in measured if figure.seconds]), flush=True)
        figures += measured
    return figures


def _measure(figure: Figure, measure: Callable[[Figure], None]) -> Figure:
    try:
        measure(figure)
    except NotMeasured as error:
        figure.note = str(error)
    except Exception as error:  # a peer that fails must not end the run; ours is named all the same
        figure.note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        figure.wrong = figure.contestant == OURS
    return figure


def judge(figure: Figure, error: float, limit: float) -> None:
    """Note an error against fp64 beyond the limit."""
    figure.wrong = error > limit
    figure.note = f"error {error:.1e}" if figure.wrong else ""


def wrong(figures: list[Figure]) -> list[str]:
    """What is wrong, a line each."""
    return [f"{figure.contestant} {figure.row.name}: {figure.note}" for figure in figures if figure.wrong]


def append(path: Path, figures: list[Figure], bytes_of: str, chip: str) -> None:
    """Add the figures to a CSV file; its column of bytes is called ``bytes_of``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(("row", "dtype", "contestant", "ms", bytes_of, "note", "commit", "torch", "chip"))
        for f in figures:
            time = f"{f.seconds * 1e3:.4f}" if f.seconds else "not measured"
            origin = f.note, hardware.commit(), torch.__version__, chip
            writer.writerow((f.row.name, f.row.dtype, f.contestant, time, f.bytes, *origin))
