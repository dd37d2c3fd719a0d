"""A rank of `longctx generate --ring`; tests/generation runs whole rings."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.launch import generate_rank, report


def test_an_error_is_reported_and_the_code_is_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("LONGCTX_PARENT", "WORLD_SIZE", "RANK", report.FOLDER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(generate_rank.faulthandler, "enable", lambda: None)  # the captured stderr is no file
    assert generate_rank.main(tmp_path / "request.json") == 1
    assert "FileNotFoundError" in capsys.readouterr().err
    monkeypatch.setenv(report.FOLDER, str(tmp_path))
    assert generate_rank.main(tmp_path / "request.json") == 1
    left = report.read(tmp_path, 0)
    assert left is not None and "request.json" in left["text"] and not left["user"]
