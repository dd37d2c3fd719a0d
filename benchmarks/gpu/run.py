"""`python -m benchmarks.gpu.run`: check and measure the rows of rows.py, decode.py, loss.py and bounded.py on one GPU.

Each figure is appended to results/*_gpu.csv as soon as it is measured; short tables are printed. `--resume` continues a
run that was stopped; `--interpret` runs the same code at tiny sizes without a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

if "--interpret" in sys.argv:  # read when triton is first imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks import hardware
from benchmarks.gpu import bounded, decode, figures, loss, measure, rows
from benchmarks.gpu.contestants import CONTESTANTS, RING, TMA
from benchmarks.gpu.figures import OURS, Figure, Run, Table
from benchmarks.gpu.rows import Row
from benchmarks.harness import RESULTS, Verdict, judge

COLUMNS = ("forward_ms", "backward_ms", "forward_tflops", "backward_tflops", "matmul_tflops")


PASSES = ("forward", "backward")


def rate(figure: Figure, direction: str) -> float:
    """Return FLOP/s; 0 where nothing was measured."""
    seconds = getattr(figure, direction)
    work = measure.flops(figure.row) * (2.5 if direction == "backward" else 1.0)
    return work / seconds if seconds else 0.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.run", description=__doc__)
    parser.add_argument("--interpret", action="store_true", help="tiny rows in triton's interpreter; no files")
    parser.add_argument("--minutes", type=float, default=7.5, help="rows not started by then are named and left out")
    parser.add_argument("--rows", nargs="+", help="only rows whose name contains one of these")
    parser.add_argument("--output", type=Path, help="folder for the CSV files (default: benchmarks/results)")
    parser.add_argument("--resume", action="store_true", help="skip what the files have of this commit and chip")
    chosen = parser.parse_args(arguments)
    device = figures.find_device(chosen.interpret, "--interpret")
    if device is None:
        return 2

    def chosen_row(name: str) -> bool:
        return not chosen.rows or any(part in name for part in chosen.rows)

    chip = "triton's interpreter" if chosen.interpret else torch.cuda.get_device_name()
    roof = None if chosen.interpret else measure.matmul_rate(device)
    print(
        f"{chip}; torch {torch.__version__}; commit {hardware.commit()}"
        + (f"; 8192^3 bf16 product {roof / 1e12:.0f} TFLOP/s" if roof else "")
    )
    folder = chosen.output or (None if chosen.interpret else RESULTS)
    this = Run(device, chosen_row, folder, chip, chosen.resume)
    found = attention(this, roof).run(_until(time.monotonic() + 60 * chosen.minutes, this.rows(rows.ROWS, rows.TINY)))
    bad = figures.wrong(found) + decode.run(this) + loss.run(this)
    print()
    judge(_verdicts(found))
    bad += figures.wrong(bounded.run(this))
    print("\n".join(f"WRONG   {what}" for what in bad) or "every result within its limit of fp64")
    return int(bool(bad))


def attention(this: Run, roof: float | None) -> Table:
    """Return the attention table; `roof`: FLOP/s of a large matrix product."""

    def others(figure: Figure) -> tuple[str, ...]:
        rates = (f"{rate(figure, direction) / 1e12:.1f}" if figure.forward else "" for direction in PASSES)
        return *rates, f"{roof / 1e12:.1f}" if roof else ""

    results, measured = this.results("attention", COLUMNS), partial(_measure, this.device)
    return Table(results, COLUMNS[:2], CONTESTANTS, measured, _line, others, (OURS, TMA, RING))


def _until(deadline: float, wanted: list[Row]) -> Iterator[Row]:
    for row in wanted:
        if time.monotonic() > deadline:
            print(f"{row.name}: not measured, the time is up", flush=True)
        else:
            yield row


def _measure(device: torch.device, figure: Figure) -> None:
    """Check a small row of this kind once, then time the row."""
    row, name = figure.row, figure.contestant
    said = check(small(row), name, device)
    inputs = measure.make_inputs(row, device)
    figure.forward, figure.backward = measure.times(CONTESTANTS[name](row, inputs), inputs)
    figure.note, figure.wrong = said, bool(said)


def small(row: Row) -> Row:
    """Return the row's kind at a size that can be checked in fp64."""
    length, group = min(row.length, measure.LONGEST_CHECK), row.heads // row.kv_heads
    window = None if row.window is None else max(1, row.window * length // row.length)
    return replace(
        row, length=length, batch=1, heads=min(row.heads, 2 * group), kv_heads=min(row.kv_heads, 2), window=window
    )


@cache
def check(row: Row, name: str, device: torch.device) -> str:
    """Return what is wrong with a contestant's results; empty if nothing is."""
    inputs = measure.make_inputs(row, device)
    call, order = CONTESTANTS[name](row, inputs), None
    if name == RING:
        from benchmarks.gpu import ring

        order = ring.order(row)
    found = measure.errors(call, inputs, row, order)
    if max(found) <= measure.LIMITS[row.dtype]:
        return ""
    return f"error {max(found):.1e} in {('out', 'dq', 'dk', 'dv')[found.index(max(found))]} of {row.name}"


def _line(row: Row, measured: list[Figure]) -> str:
    """Return a row's rates in TFLOP/s."""
    parts = (f"{f.contestant} " + "/".join(f"{rate(f, d) / 1e12:.3g}" for d in PASSES) for f in measured)
    return f"{row.name}: TFLOP/s forward/backward: " + ", ".join(parts)


def _verdicts(found: list[Figure]) -> Iterator[Verdict]:
    """Return the verdicts on every row's requirements; what was not measured is not judged."""
    by_name = {(f.row, f.contestant): f for f in found}
    for row in dict.fromkeys(f.row for f in found):
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


if __name__ == "__main__":
    raise SystemExit(main())
