"""`python -m benchmarks.gpu.run`: checks everyone, measures the rows of rows.py, decode.py, loss.py, bounded.py on one
GPU, appends each figure to results/*_gpu.csv as it is measured and prints short tables. `--resume` goes on with what a
run that was stopped has left; `--interpret` runs the same code at tiny sizes without a GPU.
"""

from __future__ import annotations

import argparse
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
from benchmarks.gpu.results import Results, milliseconds
from benchmarks.gpu.rows import Row
from benchmarks.peers import NotMeasured

RESULTS = Path(__file__).parents[1] / "results"
COLUMNS = ("forward_ms", "backward_ms", "forward_tflops", "backward_tflops", "matmul_tflops")


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
    parser.add_argument("--output", type=Path, help="folder for the CSV files (default: benchmarks/results)")
    parser.add_argument("--resume", action="store_true", help="leave out what the files have of this commit and chip")
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
    folder = chosen.output or (None if chosen.interpret else RESULTS)
    results = Results(folder / "attention_gpu.csv" if folder else None, COLUMNS, chip, chosen.resume)
    deadline, figures, wrong = time.monotonic() + 60 * chosen.minutes, [], {}
    for row in wanted:
        if time.monotonic() > deadline:
            print(f"{row.name}: not measured, the time is up", flush=True)
            continue
        for name in CONTESTANTS:
            known = results.seconds(row.name, name, "forward_ms", "backward_ms")
            figure = _measure(row, name, device, wrong) if known is None else Figure(row, name, *known)
            if known is None:
                _keep(figure, results, roof)
            figures.append(figure)
        print(_line(row, figures), flush=True)
    bad = [*filter(None, wrong.values()), *decode.run(device, chosen_row, folder, chip, chosen.resume)]
    bad += loss.run(device, chosen_row, folder, chip, chosen.resume)
    print()
    said = list(_verdicts(figures))
    for text, holds in said:
        print(("ok      " if holds else "MISSED  ") + text)
    memories = [r for r in (bounded.TINY if chosen.interpret else bounded.ROWS) if chosen_row(r.name)]
    bad += [figure.note for figure in bounded.run(memories, device, folder, chip, chosen.resume) if figure.wrong]
    print("\n".join(f"WRONG   {what}" for what in bad) or "every result within its limit of fp64")
    return int(bool(bad))


def _measure(row: Row, name: str, device: torch.device, wrong: dict[tuple[Row, str], str]) -> Figure:
    """Check a small row of this kind once, then time the row."""
    figure, kind = Figure(row, name), small(row)
    try:
        if (kind, name) not in wrong:
            wrong[kind, name] = check(kind, name, device)
        inputs = measure.make_inputs(row, device)
        figure.forward, figure.backward = measure.times(CONTESTANTS[name](row, inputs), inputs)
        figure.note = wrong[kind, name]
    except NotMeasured as error:
        figure.note = str(error)
    except Exception as error:  # a peer that fails must not end the run; ours is named all the same
        figure.note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if name in (OURS, TMA, RING):
            wrong[kind, name] = f"{name} {row.name}: {figure.note}"
    return figure


def small(row: Row) -> Row:
    """The row's kind at a size that fp64 can check."""
    length, group = min(row.length, measure.LONGEST_CHECK), row.heads // row.kv_heads
    window = None if row.window is None else max(1, row.window * length // row.length)
    return replace(
        row, length=length, batch=1, heads=min(row.heads, 2 * group), kv_heads=min(row.kv_heads, 2), window=window
    )


def check(row: Row, name: str, device: torch.device) -> str:
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


def _keep(figure: Figure, results: Results, roof: float | None) -> None:
    times = [milliseconds(x) for x in (figure.forward, figure.backward)]
    rates = [f"{(figure.rate(d) or 0) / 1e12:.1f}" if figure.forward else "" for d in ("forward", "backward")]
    values = (*times, *rates, f"{roof / 1e12:.1f}" if roof else "")
    results.add(figure.row.name, figure.row.dtype, figure.contestant, values, figure.note)


if __name__ == "__main__":
    raise SystemExit(main())
