"""`make bench` in its quick form: every row runs, everyone is checked before being timed, absent peers say so."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from house_files import ROOT


@pytest.mark.deep
@pytest.mark.timeout(600)
def test_quick_bench(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--quick", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tables = {path.stem: list(csv.DictReader(path.open(newline=""))) for path in tmp_path.glob("*.csv")}
    assert set(tables) == {"attention_cpu", "memory_cpu", "step_cpu"}
    assert all("cores" in row["hardware"] for rows in tables.values() for row in rows), "the machine is in every row"
    for row in tables["attention_cpu"]:
        if row["cpu_seconds"] == "not measured":
            assert row["note"], f"{row['contestant']} says why it was not measured"
        else:
            assert float(row["cpu_seconds"]) > 0 and float(row["largest_error"]) >= 0 and row["version"]
    measured = {row["contestant"] for row in tables["attention_cpu"] if row["cpu_seconds"] != "not measured"}
    assert measured >= {"longctx ring", "torch SDPA, 2 threads", "DeepSpeed Ulysses", "torch context parallel"}
    assert {row["contestant"] for row in tables["step_cpu"]} == {"longctx engine", "DeepSpeed Ulysses engine"}
    assert float(tables["step_cpu"][1]["loss_difference"]) <= 1e-5


def test_missed_requirements_are_judged() -> None:
    """A run that is too slow, or a ring whose memory grows with the whole sequence, is not passed over."""
    from dataclasses import asdict

    from benchmarks import memory, registry, report

    row = registry.AttentionRow(8192, "float32")
    names = {contestant.name: 1.0 for contestant in registry.CONTESTANTS} | {registry.OURS.name: 1.03}
    results = [{"contestant": name, "cpu": [seconds] * 3} for name, seconds in names.items()]
    held = dict(report.verdicts({"row": asdict(row) | {"name": row.name}, "results": results}))
    assert len(held) == 4 and not any(held.values())
    results[0]["cpu"] = [0.14] * 3
    assert all(dict(report.verdicts({"row": asdict(row) | {"name": row.name}, "results": results})).values())

    def peaks(*values: tuple[int, int, int]) -> list[bool]:
        rows = [{"row": {"local": local, "ranks": ranks}, "peak": peak} for local, ranks, peak in values]
        return [holds for _, holds in memory.verdicts(rows)]

    assert peaks((1024, 4, 100), (1024, 8, 100), (2048, 4, 200)) == [True, True]
    assert peaks((1024, 4, 100), (1024, 8, 150), (2048, 4, 300)) == [False, False]
    assert peaks((1024, 2, 100), (1024, 4, 150)) == []  # a ring of two has fewer blocks under way
