"""Error reports of ranks, and which of them is the cause of a failure."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from longctx.errors import DataError
from longctx.launch import report


def test_without_a_launcher_no_report_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(report.FOLDER, raising=False)
    assert not report.leave(0, ValueError("x"))


def test_a_report_is_read_back_and_a_missing_one_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(report.FOLDER, str(tmp_path))
    assert report.leave(1, DataError("the file is truncated"))
    found = report.read(tmp_path, 1)
    assert found is not None and (found["rank"], found["user"], found["text"]) == (1, True, "the file is truncated")
    assert report.read(tmp_path, 0) is None


def test_a_rank_without_a_report_is_the_cause_else_the_earliest_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(report.FOLDER, str(tmp_path))
    assert report.first_cause(tmp_path, {}, tmp_path).startswith("the ranks ended without an error report")
    times = iter((2.0, 1.0))
    monkeypatch.setattr(report.time, "time", lambda: next(times))
    report.leave(0, RuntimeError("a consequence"))
    report.leave(1, DataError("the cause"))
    assert report.first_cause(tmp_path, {0: 1, 1: 1}, tmp_path) == "the cause"
    killed = report.first_cause(tmp_path, {0: 1, 1: 1, 2: -signal.SIGKILL}, tmp_path)
    assert killed.startswith("rank 2 was killed by SIGKILL; the system may be out of memory")


def test_a_stop_before_the_first_step_is_told_from_a_failure(tmp_path: Path) -> None:
    text = report.stopped(tmp_path, [143, -signal.SIGTERM], signal.SIGTERM)
    assert text is not None and text.startswith("stopped by SIGTERM before the first step")
    assert report.stopped(tmp_path, [143, 3], signal.SIGTERM) is None


def test_the_tail_of_a_log_is_that_of_the_latest_run(tmp_path: Path) -> None:
    log = tmp_path / "rank.log"
    assert report.tail(log) == "(no log)"
    with log.open("ab") as file:
        file.write(b"old\n")
        report.mark(file)
    assert report.tail(log) == "(nothing was written)"
    with log.open("ab") as file:
        file.write(b"a\nb\nc\n")
    assert report.tail(log, 2) == "b\nc"
