"""The progress display."""

from __future__ import annotations

import io

import pytest

from longctx.train.report.progress import ProgressDisplay, duration

RECORD = {
    "step": 4,
    "loss": 1.5,
    "tokens_per_second": 12345.6,
    "peak_memory_bytes": 2**30,
    "grad_norm": 0.5,
    "mfu": 0.4,
}


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    progress = ProgressDisplay(stream, total=8, every=2)
    for step in (3, 4):
        progress.step(RECORD | {"step": step})
    progress.close()
    assert stream.getvalue().startswith("step 4/8  loss 1.5000  norm 0.50  12,346 tokens/s  MFU 40.0%  1.00 GiB  ")
    assert stream.getvalue().count("\n") == 1 and "left" in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressDisplay(None, total=8)
    progress.say("x")
    progress.step(RECORD)
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_durations() -> None:
    assert [duration(x) for x in (4.4, 185, 7800)] == ["4 s", "3 min 05 s", "2 h 10 min"]
