"""`python -m benchmarks.alst`: longctx beside DeepSpeed's ALST: step time, exact bytes, longest sequence under a cap.

    python -m benchmarks.alst [--quick] [--only step longest] [--length 8192] [--cap 192]

The same small Llama, ranks, ZeRO-3 and rows for everyone, in one run. ``step``: engines take turns in the same ranks
and their losses must agree; the ladder adds what ALST's paper adds, on both sides. ``longest``: bisected; every
length is tried in new ranks, under a limit that the kernel enforces on what a rank allocates after a first, short step.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks.harness import MIB, RESULTS, judge, origin, ratio, write_csv
from benchmarks.peers import deepspeed_alst, installed
from benchmarks.ranks import run_ranks
from benchmarks.registry import StepRow
from benchmarks.training_step import (
    Step,
    load_ours,
    loss_differences,
    make_config,
    make_model,
    make_optimizer,
    make_rows,
    take_turns,
)
from longctx.launch.prepare import prepare

ROW = StepRow(length=8192, vocabulary=16_384, steps=3)
QUICK = StepRow(length=1024, layers=2, hidden=64, intermediate=128, vocabulary=512, steps=1)
GRAIN = 512  # tokens: resolution of the longest sequence
SHORT = 256  # tokens of the step before the cap
# The cap counts what malloc holds, so freed memory must go back to the system at once, or chance decides what fits.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}

KEEP = {"recompute": "layer_keep_attention"}
OURS: dict[str, dict[str, Any]] = {
    "longctx ring, checkpoints": KEEP,
    "longctx ring + tiled loss": {**KEEP, "loss_tile": "auto"},
    "longctx ring + tiled loss, MLP": {**KEEP, "loss_tile": "auto", "mlp_tile": "auto"},
    "longctx": {**KEEP, "loss_tile": "auto", "mlp_tile": "auto", "recompute_norms": True},
}
LEAN = {"longctx, layers recomputed": {**OURS["longctx"], "recompute": "layer"}}  # slower: for length alone
THEIRS: dict[str, dict[str, bool]] = {
    "ZeRO-3, checkpoints": {"parallel": False, "loss": False, "mlp": False},
    "Ulysses, checkpoints": {"loss": False, "mlp": False},
    "Ulysses + tiled loss": {"mlp": False},
    "ALST": {},
}
JUDGED = ("Ulysses, checkpoints", "ALST", "longctx")
AIMS = (
    ("tokens per CPU second, longctx ÷ ALST", 1.2, True),
    ("working set, longctx ÷ ALST", 0.8, False),
    ("longest sequence, longctx ÷ ALST", 1.25, True),
    ("longest sequence, longctx ÷ Ulysses", 2.0, True),
)


def load(name: str, row: StepRow) -> Step:
    """Build a contestant's engine and return its step."""
    if name in OURS or name in LEAN:
        return load_ours(row, (OURS | LEAN)[name])[1]
    installed(deepspeed_alst.PACKAGE, deepspeed_alst.PINNED)
    model = make_model(row)
    return deepspeed_alst.load(model, make_optimizer(model), make_config(), **THEIRS[name])


# -- time and bytes at one length ------------------------------------------------------------------------------------


def step_worker(rank: int, ranks: int, row: StepRow) -> Iterator[dict[str, Any]]:
    """Time all contestants in turns; rank 0 yields the table."""
    results = take_turns({name: load(name, row) for name in [*THEIRS, *OURS]}, row, warm_up=1)
    loss_differences(results, "longctx")
    yield results


def checkpoint_bytes(name: str, row: StepRow) -> int:
    """Return what a rank saves of its layers for backward: inputs; for longctx also attention's (out, lse)."""
    local = row.length // (1 if name.startswith("ZeRO") else row.ranks)
    kept = row.hidden if name in THEIRS else 2 * row.hidden + row.heads
    return local * row.layers * kept * 4


# -- the longest sequence under a cap --------------------------------------------------------------------------------


def longest_worker(rank: int, ranks: int, name: str, row: StepRow, cap: int) -> Iterator[str]:
    """Take a step at ``row.length`` with ``cap`` bytes beyond what the rank holds after a short one; '' if it fits."""
    step = load(name, row)
    generator = torch.Generator().manual_seed(7)
    step(make_rows(replace(row, length=SHORT), generator))
    gc.collect()
    rows = make_rows(row, generator)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    held = int(status["VmData"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + cap, resource.RLIM_INFINITY))
    step(rows)
    yield ""


def fits(name: str, row: StepRow, cap: int, length: int) -> bool:
    """Try one length; every failure except lack of memory (or of a rank that died of it) is raised."""
    try:
        next(run_ranks(row.ranks, longest_worker, name, replace(row, length=length), cap))
    except RuntimeError as error:
        short = ("allocate", "memory", "Connection closed", "reset by peer", "without a word", "bad_alloc")
        if not any(word in str(error) for word in short):
            raise
        return False
    return True


def longest(try_length: Callable[[int], bool], start: int, grain: int = GRAIN) -> int:
    """Return the longest multiple of ``grain`` that fits, by doubling and then halving; 0 if none does."""
    good, bad = 0, start
    while try_length(bad):
        good, bad = bad, 2 * bad
    while bad - good > grain:
        middle = (good + bad) // 2 // grain * grain
        good, bad = (middle, bad) if try_length(middle) else (good, middle)
    return good


# -- the report ------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alst", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny and quick; nothing is judged or written")
    parser.add_argument("--only", nargs="+", choices=("step", "longest"), default=["step", "longest"])
    parser.add_argument("--length", type=int, help="tokens of the timed rows")
    parser.add_argument("--cap", type=int, default=192, help="MiB that a rank may allocate in a step")
    parser.add_argument("--ladder", action="store_true", help="the longest sequence of every rung instead of three")
    chosen = parser.parse_args()
    row = QUICK if chosen.quick else ROW
    row = replace(row, length=chosen.length or row.length)
    prepare()
    here = origin()
    print("; ".join(here.values()), flush=True)
    said: dict[str, float] = {}
    tables = {}
    if "step" in chosen.only:
        tables["alst_step_cpu"] = steps(row, said)
    if "longest" in chosen.only:
        names = [*THEIRS, *OURS, *LEAN] if chosen.ladder else list(JUDGED)
        tables["alst_longest_cpu"] = lengths(row, 16 * MIB if chosen.quick else chosen.cap * MIB, names, said)
    if chosen.quick:
        return 0
    for name, rows in tables.items():
        write_csv(RESULTS / f"{name}.csv", [one | here for one in rows])
    reached = [(aim, said[aim[0]]) for aim in AIMS if aim[0] in said]
    return int(not judge(
        (f"{text} = {value:.3f}, aim {'>=' if above else '<='} {aim}", value >= aim if above else value <= aim)
        for (text, aim, above), value in reached
    ))  # fmt: skip


def steps(row: StepRow, said: dict[str, float]) -> list[dict[str, Any]]:
    """Measure time and bytes of everyone at one length."""
    results = next(run_ranks(row.ranks, step_worker, row))
    table = []
    print(f"\none step, {row.length} tokens, {row.ranks} ranks, ZeRO-3, fp32")
    for name, result in results.items():
        kept = checkpoint_bytes(name, row)
        table.append({
            "contestant": name, "tokens": row.length, "ranks": row.ranks, "steps": len(result["cpu"]),
            "cpu_seconds": f"{median(result['cpu']):.3f}", "wall_seconds": f"{median(result['wall']):.3f}",
            "peak_bytes_per_rank": result["peak"], "checkpoint_bytes": kept, "working_set_bytes": result["peak"] - kept,
        })  # fmt: skip
        peak = f"peak {result['peak'] / MIB:8.1f} MiB = checkpoints {kept / MIB:6.1f} + rest "
        print(f"  {name:28}{median(result['cpu']):8.2f} CPU s{median(result['wall']):8.2f} s  "
              f"{peak}{(result['peak'] - kept) / MIB:8.1f}", flush=True)  # fmt: skip
    ours, theirs = results["longctx"], results["ALST"]
    said[AIMS[0][0]] = ratio(theirs["cpu"], ours["cpu"])
    said[AIMS[1][0]] = (ours["peak"] - checkpoint_bytes("longctx", row)) / (
        theirs["peak"] - checkpoint_bytes("ALST", row)
    )
    print(f"  tokens per second, longctx ÷ ALST, on the wall: {ratio(theirs['wall'], ours['wall']):.3f}")
    return table


def lengths(row: StepRow, cap: int, names: list[str], said: dict[str, float]) -> list[dict[str, Any]]:
    """Find the longest sequence of everyone under the same cap."""
    table, found = [], {}
    os.environ.update(GIVE_BACK)  # for the ranks started below
    print(f"\nlongest sequence, {row.ranks} ranks of at most {cap // MIB} MiB beyond their states, to {GRAIN} tokens")
    for name in names:
        found[name] = longest(partial(fits, name, row, cap), 4 * GRAIN)
        print(f"  {name:28}{found[name]:8}", flush=True)
        table.append({"contestant": name, "ranks": row.ranks, "cap_bytes": cap, "longest_tokens": found[name]})
    said[AIMS[2][0]] = found["longctx"] / max(found["ALST"], 1)
    said[AIMS[3][0]] = found["longctx"] / max(found["Ulysses, checkpoints"], 1)
    return table


if __name__ == "__main__":
    raise SystemExit(main())
