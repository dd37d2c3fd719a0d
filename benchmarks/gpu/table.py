"""`python -m benchmarks.gpu.table`: turn the results of `make bench-gpu` into the table that backend="auto" chooses by.

It takes plain rows of backends whose results were right and, of several measurements of one call, the last. The file it
writes, longctx/attention/backends/measured.csv, is committed: a job reads it and measures nothing itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.gpu.contestants import BACKENDS
from benchmarks.gpu.rows import ROWS
from benchmarks.harness import RESULTS as FOLDER
from benchmarks.harness import read_csv
from longctx.attention.backends.measured import TABLE, Call, Measured, write

RESULTS = FOLDER / "attention_gpu.csv"


def rows_of(results: Path) -> list[Measured]:
    """Return the rows of a results file that are figures of a backend."""
    plain = {row.name: row for row in ROWS if row.ring == 1 and row.documents == 1 and row.window is None}
    found: dict[tuple[str, Call, str], Measured] = {}
    for line in read_csv(results):
        backend, row = BACKENDS.get(line["contestant"]), plain.get(line["row"])
        times = (line["forward_ms"], line["backward_ms"])
        if backend is None or row is None:
            continue
        call = Call(line["dtype"], row.head_dim, row.heads // row.kv_heads, row.causal, row.length)
        found.pop((line["chip"], call, backend), None)
        if not line["note"] and "not measured" not in times:  # a note says what was wrong
            milliseconds = sum(map(float, times))
            found[line["chip"], call, backend] = Measured(line["chip"], call, backend, milliseconds)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.table", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="what make bench-gpu wrote")
    parser.add_argument("--output", type=Path, default=TABLE, help="the table")
    chosen = parser.parse_args()
    if not chosen.results.exists():
        raise SystemExit(f"{chosen.results} does not exist: run make bench-gpu on a GPU first")
    rows = rows_of(chosen.results)
    write(rows, chosen.output)
    print(f"{chosen.output}: {len(rows)} rows, chips: {', '.join(sorted({row.chip for row in rows})) or 'none'}")


if __name__ == "__main__":
    main()
