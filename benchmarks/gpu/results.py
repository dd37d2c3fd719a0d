"""A CSV file of figures: every figure is written as soon as it is measured, and a later run can continue."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware
from benchmarks.harness import NOT_MEASURED, read_csv


class Results:
    """One CSV file of figures, one line per row and contestant.

    Args:
        path: None writes nothing.
        columns: of the figures, between contestant and note.
        resume: skip what the file has from this commit, torch and chip, if it was measured without a note.
    """

    def __init__(self, path: Path | None, columns: Sequence[str], chip: str, resume: bool = False) -> None:
        self._path = path
        self._origin = {"commit": hardware.commit(), "torch": torch.__version__, "chip": chip}
        self._columns = ("row", "dtype", "contestant", *columns, "note", *self._origin)
        self._known: dict[tuple[str, str], dict[str, str]] = {}
        if resume and path is not None and path.exists():
            for line in read_csv(path):
                if not line["note"] and all(line[name] == value for name, value in self._origin.items()):
                    self._known[line["row"], line["contestant"]] = line

    def known(self, row: str, contestant: str) -> dict[str, str] | None:
        """Return the line of an earlier run, if this one continues it."""
        return self._known.get((row, contestant))

    def seconds(self, row: str, contestant: str, *columns: str) -> list[float] | None:
        """Return the times of a known line, given in milliseconds; None if there is no such line."""
        line = self.known(row, contestant)
        return None if line is None else [float(line[name]) / 1e3 for name in columns]

    def add(self, row: str, dtype: str, contestant: str, values: Sequence[Any], note: str) -> None:
        """Append one line; it is on disk when this returns."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(self._columns)
            writer.writerow((row, dtype, contestant, *values, note, *self._origin.values()))
            file.flush()
            os.fsync(file.fileno())


def milliseconds(seconds: float | None) -> str:
    return f"{seconds * 1e3:.4f}" if seconds else NOT_MEASURED
