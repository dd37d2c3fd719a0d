"""`python -m benchmarks.gpu.table`: what `make bench-gpu` measured becomes the table that backend="auto" chooses by.

Only plain rows of backends whose results were right; of several measurements of one call, the last. The file it writes,
longctx/attention/backends/measured.csv, is committed: a job reads it and measures nothing itself.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from benchmarks.gpu.contestants import BACKENDS
from benchmarks.gpu.rows import ROWS, Row
from longctx.attention.backends.measured import TABLE, Call, Measured, write

RESULTS = Path(__file__).parents[1] / "results" / "attention_gpu.csv"


def rows_of(results: Path) -> list[Measured]:
    """The rows of a results file that say something about a backend."""
    plain = {row.name: row for row in ROWS if row.ring == 1 and row.documents == 1 and row.window is None}
    found: dict[tuple[str, Call, str], Measured] = {}
    with results.open(newline="") as file:
        for line in csv.DictReader(file):
            backend, row = BACKENDS.get(line["contestant"]), plain.get(line["row"])
            times = (line["forward_ms"], line["backward_ms"])
            if backend is None or row is None:
                continue
            call = _call(row, line["dtype"])
            found.pop((line["chip"], call, backend), None)
            if not line["note"] and "not measured" not in times:  # a note says what was wrong
                milliseconds = sum(map(float, times))
                found[line["chip"], call, backend] = Measured(line["chip"], call, backend, milliseconds)
    return list(found.values())


def _call(row: Row, dtype: str) -> Call:
    return Call(dtype, row.head_dim, row.heads // row.kv_heads, row.causal, row.length)


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
