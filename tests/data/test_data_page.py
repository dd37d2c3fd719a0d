"""The Python on docs/data.md runs, in one go, on a folder of text and a file of conversations; its YAML is valid."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
from config_samples import text_of, variant
from tokenizer_folders import write_tokenizer

import longctx
from longctx.config.load import loads

PAGE = Path(longctx.__file__).parents[1] / "docs" / "data.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"file {number}: " + "all work and no play\n" * (number + 1))
    talk = [{"role": "user", "content": "How much work?"}, {"role": "assistant", "content": "All of it."}]
    rows = [{"messages": [*talk, {"role": "user", "content": f"And the {number}th?"}]} for number in range(60)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_tokenizer(tmp_path / "model", "qwen3")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "page.py").write_text("".join(blocks))
    monkeypatch.chdir(tmp_path)
    left = runpy.run_path(str(tmp_path / "page.py"))
    assert {key: left["state"][key] for key in ("samples_consumed", "seed")} == {"samples_consumed": 4, "seed": 0}
    assert left["batch"]["input_ids"].shape == (1, 128)
    assert left["chat"].report["conversations"] == 60 and [share["samples"] for share in left["shares"]] == [3072, 1024]
    assert (left["batch"]["labels"] >= 0).any()
    assert "row 0: zigzag, ring 2" in capsys.readouterr().out


def test_its_yaml_is_valid() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    rest = {name: section for name, section in variant().items() if name != "data"}
    data = loads(text_of(rest) + block).config.data
    assert data.sources == ("chat.jsonl", "text") and data.weights == (3, 1) and data.tokenizer == "model"
