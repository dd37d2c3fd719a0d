"""`make bench-gpu` without a GPU: the same script in triton's interpreter, tiny; and what it says without either."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from house_files import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.run", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def check(folder: Path, *rows: str) -> list[dict[str, str]]:
    done = run("--interpret", "--output", str(folder), *(("--rows", *rows) if rows else ()))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "every result within its limit" in done.stdout
    return list(csv.DictReader((folder / "attention_gpu.csv").open(newline="")))


def test_a_ring(tmp_path: Path) -> None:
    table = check(tmp_path, "ring4")
    measured = {row["contestant"] for row in table if row["forward_ms"] != "not measured"}
    assert measured == {"longctx", "longctx, TMA", "longctx, ring in sequence"}
    assert all(row["note"] for row in table if row["forward_ms"] == "not measured"), "absent ones say why"
    assert {row["chip"] for row in table} == {"triton's interpreter"}


def test_decoding(tmp_path: Path) -> None:
    check(tmp_path, "decode")
    table = list(csv.DictReader((tmp_path / "decode_gpu.csv").open(newline="")))
    measured = {(row["row"].split("-")[1], row["contestant"]) for row in table if row["ms"] != "not measured"}
    assert measured == {(kind, name) for kind in ("el", "mla", "gqa") for name in ("longctx", "longctx, torch")}
    assert all(row["note"] for row in table if row["ms"] == "not measured"), "absent ones say why"


@pytest.mark.slow
def test_every_tiny_row(tmp_path: Path) -> None:
    table = check(tmp_path)
    assert {row["contestant"] for row in table if row["forward_ms"] != "not measured"} == {
        "longctx", "longctx, TMA", "longctx, ring in sequence", "tutorial"
    }  # fmt: skip


def test_without_a_gpu_nothing_is_measured() -> None:
    done = run()
    assert done.returncode == 2 and "no GPU" in done.stdout


def test_no_row_of_an_interpreter_is_kept() -> None:
    for name in ("attention_gpu.csv", "decode_gpu.csv"):
        kept = ROOT / "benchmarks" / "results" / name
        assert not kept.exists() or "interpreter" not in kept.read_text()
