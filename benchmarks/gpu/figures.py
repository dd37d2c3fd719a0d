"""What the GPU tables share: one figure per row and contestant, in a file as soon as it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.gpu.results import Results, milliseconds
from benchmarks.peers import NotMeasured

OURS = "longctx"
R = TypeVar("R", bound=Any)


@dataclass
class Figure:
    """One contestant in one row: seconds (of both passes in `forward`, where they are timed together) or why none."""

    row: Any
    contestant: str
    forward: float | None = None
    backward: float | None = None
    note: str = ""
    wrong: bool = False
    bytes: int | None = None


@dataclass(frozen=True)
class Run:
    """What all tables of one run share.

    Attributes:
        device: a GPU, or the CPU where Triton's interpreter runs tiny rows.
        wanted: whether a row of that name is measured.
        folder: of the CSV files; None writes none.
        chip: its name.
        resume: skip what the files have.
    """

    device: torch.device
    wanted: Callable[[str], bool]
    folder: Path | None
    chip: str
    resume: bool

    def rows(self, rows: Sequence[R], tiny: Sequence[R]) -> list[R]:
        """Return the wanted rows, of the tiny ones without a GPU."""
        return [row for row in (rows if self.device.type == "cuda" else tiny) if self.wanted(row.name)]

    def results(self, name: str, columns: Sequence[str]) -> Results:
        """Open one table's file."""
        return Results(self.folder / f"{name}_gpu.csv" if self.folder else None, columns, self.chip, self.resume)


@dataclass(frozen=True)
class Table:
    """How one table measures its rows.

    Attributes:
        results: the file.
        times: its columns of milliseconds: of both passes together, or of forward and of backward.
        contestants: names, in order.
        measure: fills in a figure; raises NotMeasured where the contestant cannot do the row.
        line: (row, its measured figures) -> what is printed.
        others: a figure's further columns.
        ours: contestants that must not fail.
    """

    results: Results
    times: tuple[str, ...]
    contestants: Iterable[str]
    measure: Callable[[Figure], None]
    line: Callable[[Any, list[Figure]], str]
    others: Callable[[Figure], tuple[Any, ...]] = lambda _: ()
    ours: tuple[str, ...] = (OURS,)

    def run(self, rows: Iterable[Any]) -> list[Figure]:
        """Measure every contestant in every row; append each figure to the file, print one line per row."""
        figures: list[Figure] = []
        for row in rows:
            found = [self._figure(Figure(row, name)) for name in self.contestants]
            print(self.line(row, [figure for figure in found if figure.forward]), flush=True)
            figures += found
        return figures

    def _figure(self, figure: Figure) -> Figure:
        known = self.results.seconds(figure.row.name, figure.contestant, *self.times)
        if known is not None:
            figure.forward, figure.backward = [*known, None][:2]
            return figure
        try:
            self.measure(figure)
        except NotMeasured as error:
            figure.note = str(error)
        except Exception as error:  # a failing peer must not end the run
            figure.note = f"{type(error).__name__}: {error}".splitlines()[0]
            figure.wrong = figure.contestant in self.ours
        seconds = (figure.forward, figure.backward)[: len(self.times)]
        values = (*map(milliseconds, seconds), *self.others(figure))
        self.results.add(figure.row.name, figure.row.dtype, figure.contestant, values, figure.note)
        return figure


def compare(figure: Figure, error: float, limit: float) -> None:
    """Note an error against fp64 above the limit."""
    figure.wrong = not error <= limit
    figure.note = f"error {error:.1e}, allowed {limit:.0e}" if figure.wrong else ""


def wrong(figures: Iterable[Figure]) -> list[str]:
    """Return one line per figure with wrong results."""
    return [f"{figure.contestant} {figure.row.name}: {figure.note}" for figure in figures if figure.wrong]


def need_gpu(x: torch.Tensor) -> None:
    """Raise NotMeasured unless x is on a GPU."""
    if x.device.type != "cuda":
        raise NotMeasured("needs a GPU")


def find_device(without: bool, flag: str) -> torch.device | None:
    """Return the GPU, or the CPU if the caller asked to go `without` one; None, having said so, if there is no GPU."""
    if without:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    print(f"no GPU here: nothing done. {flag} runs the script without one.")
    return None
