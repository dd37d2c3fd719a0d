"""metrics.jsonl: resume, full disks, damaged lines."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import pytest

from longctx.train.report.metrics import Metrics, read


def test_metrics_drop_what_will_be_done_again(tmp_path: Path) -> None:
    writer = Metrics(tmp_path)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": float(step), "grad_norm": math.inf})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a crash in the middle of a line
    again = Metrics(tmp_path, resume_step=2, tensorboard=True)
    again.write({"step": 3, "loss": 9.0})
    again.close()
    assert [(r["step"], r["loss"]) for r in read(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    assert read(tmp_path)[0]["grad_norm"] is None
    assert list((tmp_path / "tensorboard").iterdir())


def test_metrics_wait_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, content: bytes) -> int:
            if room:
                return real.write(content[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None:
            real.close()

    said: list[str] = []
    metrics, room = Metrics(tmp_path, say=said.append), False
    real = metrics._file
    monkeypatch.setattr(metrics, "_file", Full())
    for step in (1, 2):
        metrics.write({"step": step, "loss": 2.0})
    assert read(tmp_path) == [] and len(said) == 1 and "No space left" in said[0]
    room = True
    metrics.write({"step": 3, "loss": 2.0})
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3]
    room = False
    metrics.write({"step": 4, "loss": 2.0})
    metrics.close()
    assert len(said) == 3 and "1 steps could not be written" in said[2]


def test_damaged_metrics_are_kept_aside_and_do_not_stop_a_run(tmp_path: Path) -> None:
    lines = [b'{"step": 1, "loss": 1.0}', b"\xff\xfe", b"[1]", b'{"step": "x"}', b'{"step": 2, "loss": 2.0}', b'{"st']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    said: list[str] = []
    Metrics(tmp_path, resume_step=1, say=said.append).close()
    assert [record["step"] for record in read(tmp_path)] == [1]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"\n".join(lines)
    assert "metrics.jsonl: 3 damaged lines" in said[0] and "1 steps after step 1 are dropped" in said[1]
    said.clear()
    Metrics(tmp_path, resume_step=1, say=said.append).close()
    assert not said
