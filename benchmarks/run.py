"""`python -m benchmarks.run`: measure the rows of registry.py, print them, write results/*.csv, judge them.

The exit code is 1 if a requirement is missed, unless --quick, whose rows are too short to judge.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks import attention, hardware, memory, registry, report, training_step
from benchmarks.harness import RESULTS, Verdict, judge, write_csv
from benchmarks.ranks import run_ranks
from longctx.launch.prepare import prepare

ATTENTION_COLUMNS = (
    "contestant", "cpu_seconds", "wall_seconds", "exposed_share", "peak_bytes_per_rank", "ours_over_theirs_cpu",
    "ours_over_theirs_wall", "largest_error", "turns", "note",
)  # fmt: skip
MEMORY_COLUMNS = ("local_tokens", "ranks", "peak_bytes_per_rank", "peak_in_local_tensors")
STEP_COLUMNS = (
    "contestant", "tokens_per_cpu_second", "tokens_per_second", "cpu_seconds", "wall_seconds", "peak_bytes_per_rank",
    "ours_over_theirs_speed", "loss_difference", "note",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small rows, under a minute; nothing is judged")
    parser.add_argument(
        "--only", nargs="+", choices=("attention", "memory", "step"), default=["attention", "memory", "step"]
    )
    parser.add_argument("--rows", nargs="+", help="only the attention rows whose name contains one of these")
    parser.add_argument("--without", nargs="+", default=[], help="leave out contestants with one of these in the name")
    parser.add_argument("--output", type=Path, help="folder for the CSV files (default: benchmarks/results)")
    chosen = parser.parse_args(arguments)
    folder = chosen.output or (None if chosen.quick or chosen.rows or chosen.without else RESULTS)
    load = hardware.load()
    print(f"{hardware.describe()}; load {load:.2f}; commit {hardware.commit()}", flush=True)
    if load > 0.5:
        print("the machine is busy: CPU times hold, wall times and exposed shares do not", flush=True)
    prepare()  # compile DeepSpeed's CPU communication once, before ranks race to do it
    said: list[Verdict] = []
    for kind in chosen.only:
        rows, verdicts = {"attention": _attention, "memory": _memory, "step": _step}[kind](chosen, load)
        said += verdicts
        if folder and rows:
            write_csv(folder / f"{kind}_cpu.csv", rows)
    print()
    return int(not judge(said) and not chosen.quick)


def _attention(chosen: argparse.Namespace, load: float) -> tuple[list[report.Row], list[Verdict]]:
    rows: list[report.Row] = []
    said = []
    listed = registry.QUICK_ATTENTION_ROWS if chosen.quick else registry.ATTENTION_ROWS
    wanted = [row for row in listed if not chosen.rows or any(part in row.name for part in chosen.rows)]
    for ranks in sorted({row.ranks for row in wanted}):
        of_ranks = [row for row in wanted if row.ranks == ranks]
        for measured in run_ranks(ranks, attention.worker, of_ranks, chosen.without):
            flat = report.attention_rows(measured, load)
            print(f"\n{measured['row']['name']}: causal, forward + backward, {ranks} CPU ranks")
            report.show(flat, ATTENTION_COLUMNS)
            rows += flat
            said += report.verdicts(measured) if ranks == 2 else []  # more ranks than cores: shown, not judged
    return rows, said


def _memory(chosen: argparse.Namespace, load: float) -> tuple[list[report.Row], list[Verdict]]:
    listed = registry.QUICK_MEMORY_ROWS if chosen.quick else registry.MEMORY_ROWS
    measured: list[dict[str, Any]] = []
    for ranks in sorted({row.ranks for row in listed}):
        measured += run_ranks(ranks, memory.worker, [row for row in listed if row.ranks == ranks])
    flat = report.memory_rows(measured, load)
    print("\nring attention, peak bytes per rank, forward + backward, 8 heads of 64, fp32")
    report.show(flat, MEMORY_COLUMNS)
    return flat, memory.verdicts(measured)


def _step(chosen: argparse.Namespace, load: float) -> tuple[list[report.Row], list[Verdict]]:
    row = registry.QUICK_STEP_ROW if chosen.quick else registry.STEP_ROW
    measured = training_step.measure_row(row)
    flat = report.step_rows(measured, load)
    millions = measured["parameters"] / 1e6
    print(f"\ntraining step: Llama of {millions:.1f} M parameters, ZeRO-3, {row.length} tokens, {row.ranks} CPU ranks")
    report.show(flat, STEP_COLUMNS)
    return flat, training_step.verdicts(measured)


if __name__ == "__main__":
    raise SystemExit(main())
