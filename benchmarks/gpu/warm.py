"""`python3 -m benchmarks.gpu.warm`: compile every attention kernel that benchmarks.gpu.run needs, in many processes.

Each kind of row is checked once at a small size in a process of its own; what it compiles stays in triton's cache. Run
this first on a GPU: a single process would compile for minutes in the middle of the measurements.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

if "--interpret" in sys.argv:  # read when triton is first imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.gpu import rows, run
from benchmarks.gpu.contestants import RING, TMA
from benchmarks.gpu.figures import OURS, find_device
from benchmarks.gpu.rows import Row

Job = tuple[Row, str, str]


def jobs(chosen: tuple[Row, ...], device: str) -> list[Job]:
    """Return (row, contestant, device) for every kind that kernels are compiled for."""
    found: dict[tuple[object, ...], Job] = {}
    for row in chosen:
        for name in (OURS, TMA, RING):
            kind = (row.head_dim, row.heads // row.kv_heads, row.documents > 1, row.window is None, row.ring > 1, name)
            if row.ring > 1 or name != RING:
                found.setdefault(kind, (row, name, device))
    return list(found.values())


def one(job: Job) -> str:
    """Return what is wrong; empty if nothing is."""
    row, name, device = job
    torch.set_num_threads(1)
    try:
        return run.check(run.small(row), name, torch.device(device))
    except Exception as error:  # the other jobs continue
        return f"{type(error).__name__}: {str(error)[:200]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu.warm", description=__doc__)
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1), help="in parallel")
    parser.add_argument("--interpret", action="store_true", help="tiny rows in triton's interpreter")
    chosen = parser.parse_args(arguments)
    if find_device(chosen.interpret, "--interpret") is None:
        return 2
    made = jobs(rows.TINY if chosen.interpret else rows.ROWS, "cpu" if chosen.interpret else "cuda")
    began, bad = time.monotonic(), 0
    with ProcessPoolExecutor(chosen.processes, mp_context=get_context("spawn")) as pool:
        for (row, name, _), said in zip(made, pool.map(one, made), strict=True):
            bad += bool(said)
            print(f"WRONG   {name} {row.name}: {said}" if said else f"ok      {name} {row.name}", flush=True)
    print(f"{len(made)} kinds in {time.monotonic() - began:.0f} s, {bad} wrong")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
