"""The Python on docs/data.md runs, in one go, on a folder of text."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import longctx

PAGE = Path(longctx.__file__).parents[1] / "docs" / "data.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"file {number}: " + "all work and no play\n" * (number + 1))
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "page.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    left = runpy.run_path(str(tmp_path / "page.py"))
    assert {key: left["state"][key] for key in ("samples_consumed", "seed")} == {"samples_consumed": 4, "seed": 0}
    assert left["batch"]["input_ids"].shape == (1, 128)
    assert "row 0: zigzag, ring 2" in capsys.readouterr().out
