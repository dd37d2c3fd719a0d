"""`make bench-gpu` without a GPU: the same script in triton's interpreter, tiny; and what it says without either."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from house_files import ROOT

from benchmarks.gpu import bounded, longest, warm
from benchmarks.gpu.contestants import fresh_compiler
from benchmarks.gpu.results import Results
from benchmarks.gpu.rows import FIRST, ROWS, TINY


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
    path = folder / "attention_gpu.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


@pytest.mark.deep
def test_a_ring(tmp_path: Path) -> None:
    table = check(tmp_path, "ring4")
    measured = {row["contestant"] for row in table if row["forward_ms"] != "not measured"}
    assert measured == {"longctx", "longctx, TMA", "longctx, ring in sequence"}
    assert all(row["note"] for row in table if row["forward_ms"] == "not measured"), "absent ones say why"
    assert {row["chip"] for row in table} == {"triton's interpreter"}


@pytest.mark.deep
def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """Each figure is in the file as soon as it is measured; --resume measures what is missing, wrong or of another."""
    path = tmp_path / "attention_gpu.csv"
    check(tmp_path, "ring4")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n")  # ours and one more are done
    done = run("--interpret", "--resume", "--output", str(tmp_path), "--rows", "ring4")
    assert done.returncode == 0, done.stderr[-3000:]
    again = path.read_text().splitlines()
    measured = [line for line in lines[1:3] if "not measured" not in line]
    assert measured and again[:3] == lines[:3] and len(again) == len(lines) + (2 - len(measured))
    results = Results(path, ("forward_ms",), "triton's interpreter", resume=True)
    assert results.known(lines[1].split(",")[0], "longctx") is not None
    assert Results(path, ("forward_ms",), "another chip", resume=True).known(lines[1].split(",")[0], "longctx") is None


def test_a_figure_is_kept_before_the_next_is_measured(tmp_path: Path) -> None:
    results = Results(tmp_path / "sub" / "some_gpu.csv", ("ms",), "a chip")
    for count in (1, 2):
        results.add("a row", "float32", f"contestant {count}", ("1.0",), "")
        assert len((tmp_path / "sub" / "some_gpu.csv").read_text().splitlines()) == 1 + count


def test_kernels_are_compiled_first() -> None:
    """Every kind of row and contestant once, the checks of the benchmark itself, in processes of their own."""
    made = warm.jobs(ROWS, "cuda")
    assert len(set(made)) == len(made) < 3 * len(ROWS)
    assert {row.head_dim for row, *_ in made} == {64, 128, 256} and ROWS[: len(FIRST)] == FIRST
    assert not warm.one((TINY[1], "longctx", "cpu"))
    assert "needs" in warm.one((TINY[1], "longctx over cuDNN", "cpu"))


def test_a_compiled_contestant_is_never_measured_unfused() -> None:
    """From the ninth shape on torch.compile gives up in silence: forgotten for each row, and an error if it is met."""
    limit, settings = torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    try:
        for size in range(2, 2 * limit):
            fresh_compiler()
            torch.compile(double, dynamic=False, backend="eager")(torch.zeros(size))
        compiled = torch.compile(double, dynamic=False, backend="eager")
        with pytest.raises(Exception, match="(?i)recompil"):
            for size in range(2, 2 * limit + 2):
                compiled(torch.zeros(size))
    finally:
        torch._dynamo.config.fail_on_recompile_limit_hit = settings
        torch._dynamo.reset()


def test_decoding(tmp_path: Path) -> None:
    check(tmp_path, "decode")
    table = list(csv.DictReader((tmp_path / "decode_gpu.csv").open(newline="")))
    measured = {(row["row"].split("-")[1], row["contestant"]) for row in table if row["ms"] != "not measured"}
    assert measured == {(kind, name) for kind in ("el", "mla", "gqa") for name in ("longctx", "longctx, torch")}
    assert all(row["note"] for row in table if row["ms"] == "not measured"), "absent ones say why"


@pytest.mark.deep
def test_the_loss(tmp_path: Path) -> None:
    check(tmp_path, "loss")
    table = list(csv.DictReader((tmp_path / "loss_gpu.csv").open(newline="")))
    measured = [row["contestant"] for row in table if row["ms"] != "not measured"]
    assert measured == ["longctx", "longctx, torch", "all logits"]
    assert [row["note"] for row in table if row["ms"] == "not measured"] == ["needs a GPU"]


@pytest.mark.slow
def test_every_tiny_row(tmp_path: Path) -> None:
    table = check(tmp_path)
    assert {row["contestant"] for row in table if row["forward_ms"] != "not measured"} == {
        "longctx", "longctx, TMA", "longctx, ring in sequence", "tutorial"
    }  # fmt: skip


def test_bounded_memories(tmp_path: Path) -> None:
    done = run("--interpret", "--output", str(tmp_path), "--rows", "cosine-")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = list(csv.DictReader((tmp_path / "bounded_gpu.csv").open(newline="")))
    absent = [row for row in table if row["forward_ms"] == "not measured"]
    assert {row["contestant"] for row in table} - {row["contestant"] for row in absent} == {"longctx", "longctx, torch"}
    assert [(row["contestant"], row["note"]) for row in absent] == [
        ("fla chunk_linear_attn", "not measured: needs a GPU")
    ]


def test_verdicts_on_bounded_memories() -> None:
    row = bounded.Row("abc", 16_384)
    moved = 16 * 16_384 * 2 * (4 * 64 + 64), 16 * 16_384 * 2 * (8 * 64 + 64)
    assert bounded.bytes_moved(row) == moved
    seconds = {"longctx": 2.0, "longctx, torch": 9.0, "fla chunk_abc": 3.0, "fla chunk_gsa": None}
    figures = [bounded.Figure(row, name, time, time) for name, time in seconds.items()]
    said = dict(bounded.verdicts(figures, moved[0] / 1.7))
    assert said == {
        f"{row.name} forward: 1.50 x fla chunk_abc, required 1.0": True,
        f"{row.name} forward: 0.85 of the bandwidth floor, required 0.8": True,
        f"{row.name} backward: 1.50 x fla chunk_abc, required 1.0": True,
        f"{row.name} backward: 1.53 of the bandwidth floor, required 0.8": True,
    }
    slow = [replace(f, forward=6.0, backward=6.0) if f.contestant == "longctx" else f for f in figures]
    assert not any(holds for _, holds in bounded.verdicts(slow, moved[0] / 1.7))


def test_without_a_gpu_nothing_is_measured() -> None:
    done = run()
    assert done.returncode == 2 and "no GPU" in done.stdout


def test_no_row_of_an_interpreter_is_kept() -> None:
    for name in ("attention_gpu.csv", "decode_gpu.csv"):
        kept = ROOT / "benchmarks" / "results" / name
        assert not kept.exists() or "interpreter" not in kept.read_text()


@pytest.mark.slow
def test_the_ladder_of_the_longest_sequence() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.longest", "--tiny"],
        cwd=ROOT, env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    peaks = dict(re.findall(r"contestant (.*?)  layers.*peak_bytes (\d+)", done.stdout))
    assert set(peaks) == {*longest.THEIRS, *longest.OURS}
    whole, tiled = (int(peaks[name]) for name in ("longctx, checkpoints", "longctx + norms recomputed"))
    assert tiled < 0.7 * whole
    assert int(peaks["longctx + norms recomputed"]) < int(peaks["longctx + attention kept"])
