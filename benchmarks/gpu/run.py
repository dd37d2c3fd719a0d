"""`python -m benchmarks.gpu.run`: checks everyone, measures the rows of rows.py, decode.py, loss.py, bounded.py on one
GPU, appends them to results/*_gpu.csv and prints short tables. `--interpret` runs the same code at tiny sizes without.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if "--interpret" in sys.argv:  # read when triton is first imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks import hardware
from benchmarks.gpu import bounded, decode, loss, measure, rows
from benchmarks.gpu.contestants import CONTESTANTS, OURS, RING, TMA
from benchmarks.gpu.rows import Row
from benchmarks.peers import NotMeasured

RESULTS = Path(__file__).parents[1] / "results"


@dataclass
class Figure:
    """One contestant in one row: seconds, or why there are none."""

    row: Row
    contestant: str
    forward: float | None = None
    backward: float | None = None
    note: str = ""

    def rate(self, direction: str) -> float | None:
        """FLOP/s."""
        seconds = getattr(self, direction)
        work = measure.flops(self.row) * (2.5 if direction == "backward" else 1.0)
        return None if not seconds else work / seconds


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.run", description=__doc__)
    parser.add_argument("--interpret", action="store_true", help="tiny rows in triton's interpreter; nothing is kept")
    parser.add_argument("--minutes", type=float, default=7.5, help="rows not begun by then are left out, by name")
    parser.add_argument("--rows", nargs="+", help="only rows whose name contains one of these")
    parser.add_argument("--output", type=Path, help="folder for the CSV file (default: benchmarks/results)")
    chosen = parser.parse_args(arguments)
    if not chosen.interpret and not torch.cuda.is_available():
        print("no GPU here: nothing measured. --interpret exercises the script without one.")
        return 2
    device = torch.device("cpu" if chosen.interpret else "cuda")

    def chosen_row(name: str) -> bool:
        return not chosen.rows or any(part in name for part in chosen.rows)

    wanted = [r for r in (rows.TINY if chosen.interpret else rows.ROWS) if chosen_row(r.name)]
    chip = "triton's interpreter" if chosen.interpret else torch.cuda.get_device_name()
    roof = None if chosen.interpret else measure.matmul_rate(device)
    print(
        f"{chip}; torch {torch.__version__}; commit {hardware.commit()}"
        + (f"; 8192^3 bf16 product {roof / 1e12:.0f} TFLOP/s" if roof else "")
    )
    deadline, figures, wrong = time.monotonic() + 60 * chosen.minutes, [], {}
    for row in wanted:
        if time.monotonic() > deadline:
            print(f"{row.name}: not measured, the time is up", flush=True)
            continue
        figures += [_measure(row, name, device, wrong) for name in CONTESTANTS]
        print(_line(row, figures), flush=True)
    folder = chosen.output or (None if chosen.interpret else RESULTS)
    bad = [*filter(None, wrong.values()), *decode.run(device, chosen_row, folder, chip)]
    bad += loss.run(device, chosen_row, folder, chip)
    if folder:
        _append(folder / "attention_gpu.csv", figures, chip, roof)
    print()
    said = list(_verdicts(figures))
    for text, holds in said:
        print(("ok      " if holds else "MISSED  ") + text)
    memories = [r for r in (bounded.TINY if chosen.interpret else bounded.ROWS) if chosen_row(r.name)]
    bad += [figure.note for figure in bounded.run(memories, device, folder) if figure.wrong]
    print("\n".join(f"WRONG   {what}" for what in bad) or "every result within its limit of fp64")
    return int(bool(bad))


def _measure(row: Row, name: str, device: torch.device, wrong: dict[tuple[Row, str], str]) -> Figure:
    """Check a small row of this kind once, then time the row."""
    figure, small = Figure(row, name), _small(row)
    try:
        if (small, name) not in wrong:
            wrong[small, name] = _check(small, name, device)
        inputs = measure.make_inputs(row, device)
        figure.forward, figure.backward = measure.times(CONTESTANTS[name](row, inputs), inputs)
        figure.note = wrong[small, name]
    except NotMeasured as error:
        figure.note = str(error)
    except Exception as error:  # a peer that fails must not end the run; ours is named all the same
        figure.note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if name in (OURS, TMA, RING):
            wrong[small, name] = f"{name} {row.name}: {figure.note}"
    return figure


def _small(row: Row) -> Row:
    """The row's kind at a size that fp64 can check."""
    length, group = min(row.length, measure.LONGEST_CHECK), row.heads // row.kv_heads
    window = None if row.window is None else max(1, row.window * length // row.length)
    return replace(
        row, length=length, batch=1, heads=min(row.heads, 2 * group), kv_heads=min(row.kv_heads, 2), window=window
    )


def _check(row: Row, name: str, device: torch.device) -> str:
    """What is wrong with a contestant's results; empty if nothing is."""
    inputs = measure.make_inputs(row, device)
    call, order = CONTESTANTS[name](row, inputs), None
    if name == RING:
        from benchmarks.gpu import ring

        order = ring.order(row)
    found = measure.errors(call, inputs, row, order)
    if max(found) <= measure.LIMITS[row.dtype]:
        return ""
    return f"{name} {row.name}: error {max(found):.1e} in {('out', 'dq', 'dk', 'dv')[found.index(max(found))]}"


def _line(row: Row, figures: list[Figure]) -> str:
    """A row's rates in TFLOP/s."""
    parts = []
    for figure in figures:
        if figure.row is row and figure.forward is not None:
            rates = "/".join(f"{(figure.rate(d) or 0) / 1e12:.3g}" for d in ("forward", "backward"))
            parts.append(f"{figure.contestant} {rates}")
    return f"{row.name}: TFLOP/s forward/backward: " + ", ".join(parts)


def _verdicts(figures: list[Figure]) -> Any:
    """Each requirement on a row, with whether it holds; what was not measured is not judged."""
    by_name = {(f.row, f.contestant): f for f in figures}
    for row in dict.fromkeys(f.row for f in figures):
        own, split = by_name[row, OURS], by_name[row, RING]
        for required in rows.REQUIRED:
            theirs, ours = (
                getattr(by_name[row, name], required.direction) for name in (required.contestant, required.ours)
            )
            if theirs and ours and row.causal and row.head_dim == 128 and row.length >= required.length:
                text = f"{row.name} {required.direction}: {required.ours} {theirs / ours:.2f} x {required.contestant}"
                yield f"{text}, required {required.ratio}", theirs / ours >= required.ratio
        if split.forward and own.forward and row.length // row.ring >= 8192:
            share = (own.forward + own.backward) / (split.forward + split.backward)
            yield f"{row.name}: one call ÷ {row.ring} steps = {share:.3f}, required {rows.SPLIT}", share >= rows.SPLIT


def _append(path: Path, figures: list[Figure], chip: str, roof: float | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        columns = ("row", "dtype", "contestant", "forward_ms", "backward_ms", "forward_tflops", "backward_tflops",
                   "matmul_tflops", "note", "commit", "torch", "chip")  # fmt: skip
        writer = csv.writer(file)
        if new:
            writer.writerow(columns)
        for f in figures:
            times = [f"{x * 1e3:.4f}" if x else "not measured" for x in (f.forward, f.backward)]
            rates = [f"{(f.rate(d) or 0) / 1e12:.1f}" if f.forward else "" for d in ("forward", "backward")]
            origin = (f"{roof / 1e12:.1f}" if roof else "", f.note, hardware.commit(), torch.__version__, chip)
            writer.writerow((f.row.name, f.row.dtype, f.contestant, *times, *rates, *origin))


if __name__ == "__main__":
    raise SystemExit(main())
