"""What decode.py and loss.py have in common: rows of contestants, a figure each, a table that grows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.results import Results, milliseconds
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
    results: Results,
) -> list[Figure]:
    """Measure every contestant in every row; add each figure to the results, print a line a row."""
    figures: list[Figure] = []
    for row in rows:
        measured = [_measure(Figure(row, name), measure, results) for name in contestants]
        print(describe(row, [figure for figure in measured if figure.seconds]), flush=True)
        figures += measured
    return figures


def _measure(figure: Figure, measure: Callable[[Figure], None], results: Results) -> Figure:
    row, name = figure.row, figure.contestant
    known = results.seconds(row.name, name, "ms")
    if known is not None:
        figure.seconds = known[0]
        return figure
    try:
        measure(figure)
    except NotMeasured as error:
        figure.note = str(error)
    except Exception as error:  # a peer that fails must not end the run; ours is named all the same
        figure.note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        figure.wrong = name == OURS
    results.add(row.name, row.dtype, name, (milliseconds(figure.seconds), figure.bytes), figure.note)
    return figure


def judge(figure: Figure, error: float, limit: float) -> None:
    """Note an error against fp64 beyond the limit."""
    figure.wrong = error > limit
    figure.note = f"error {error:.1e}" if figure.wrong else ""


def wrong(figures: list[Figure]) -> list[str]:
    """What is wrong, a line each."""
    return [f"{figure.contestant} {figure.row.name}: {figure.note}" for figure in figures if figure.wrong]
