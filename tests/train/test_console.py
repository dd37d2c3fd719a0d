"""Losing the console loses the display and nothing else."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import config, losses, write

from longctx.train.report.console import Console, guard_standard_streams
from longctx.train.report.progress import ProgressDisplay
from longctx.train.run import run

from distributed import run_ranks

RECORD = {"step": 4, "loss": 1.5, "tokens_per_second": 12345.6, "peak_memory_bytes": 2**30}


def broken_pipe() -> Any:
    end, other = os.pipe()
    os.close(end)
    return os.fdopen(other, "w", buffering=1)


def closed() -> Any:
    stream = io.StringIO()
    stream.close()
    return stream


LOST = {"broken pipe": broken_pipe, "full disk": lambda: open("/dev/full", "w", buffering=1), "closed": closed}


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("columns", [0, 80])
def test_a_lost_console_is_silent(kind: str, columns: int) -> None:
    stream = LOST[kind]()
    progress = ProgressDisplay(stream, total=8, columns=columns)
    for step in range(5):
        progress.say("a line")
        progress.step(RECORD | {"step": step})
    progress.close()
    guarded = Console(stream)
    guarded.write("a line\n"), guarded.flush()
    assert guarded.lost and not guarded.isatty()
    try:
        stream.close()
    except OSError:
        pass


def test_what_a_console_cannot_encode_is_replaced() -> None:
    raw = io.BytesIO()
    console = Console(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    assert console.write("größer → 1\n") == 11
    console.write("more\n")
    assert raw.getvalue() == b"gr??er ? 1\nmore\n" and not console.lost


def test_streams_of_the_process_are_guarded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", broken_pipe())
    monkeypatch.setattr(sys, "stderr", None)  # closed when Python started
    guard_standard_streams(), guard_standard_streams()
    for _ in range(3):
        print("a line", flush=True)
        print("a line", file=sys.stderr, flush=True)
    assert not isinstance(sys.stdout.stream, Console)


def on_a_full_console(rank: int, world: int, folder: str) -> int:
    with open("/dev/full", "w", buffering=1) as stream:
        try:
            return run(config(Path(folder), "train.steps=2", "output.sample_tokens=0"), console=stream)
        finally:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is buffered goes there


@pytest.mark.deep
def test_a_run_ends_well_on_a_console_that_is_full(tmp_path: Path) -> None:
    write(tmp_path)
    assert run_ranks(2, on_a_full_console, str(tmp_path), timeout=280) == [0, 0]
    assert len(losses(tmp_path / "run")) == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"
