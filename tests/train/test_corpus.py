"""From the data section to token files: what was left out is said, and the data that checkpoints count stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import config, write

from longctx.data.build import open_build
from longctx.errors import DataError
from longctx.train import corpus as module
from longctx.train.corpus import build_corpus, prepare_corpus


def pretend_checkpoint(output: Path) -> None:
    folder = output / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def test_what_was_read_and_left_out_is_said(tmp_path: Path) -> None:
    write(tmp_path)
    text = tmp_path / "text"
    (text / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (text / ".cache").write_text("hidden")
    (text / "empty.txt").touch()
    (text / "rows.json").write_text('{"text": "one"}\n{"text": " "}\n{"text": "three"}\n')
    said: list[str] = []
    found = prepare_corpus(config(tmp_path, "data.exclude=['11*']"), said.append)
    for line in (
        "data: reading",
        "data: tokenising",
        "data: files read: JSON lines 1, text 11",
        "data: left out, hidden: 1 files, 6 bytes (.cache)",
        "data: left out, image: 1 files, 10 bytes (picture.png)",
        "data: left out, empty: 1 files, 0 bytes (empty.txt)",
        "data: left out: 1 documents are blank",
    ):
        assert line in said, said
    size = (text / "11.txt").stat().st_size
    assert f"data: left out, named by data.exclude: 1 files, {size} bytes (11.txt)" in said
    assert found.report["skipped_files"] == 4 and found.report["documents"] == 13
    said.clear()
    again = prepare_corpus(config(tmp_path, "data.exclude=['11*']"), said.append)
    assert again.report == found.report and any("image: 1 files" in line for line in said)


def test_progress_is_said_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = [100.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    stages = module._Stages(said.append)
    for done in range(0, 50, 2):
        clock[0] += 1
        stages("tokenising", done * 10**6, 100 * 10**6)
    stages("checking train.tokens", 0, 0)
    assert said == [
        "data: tokenising",
        "data: tokenising, 20 of 100 MB (20%)",
        "data: tokenising, 40 of 100 MB (40%)",
        "data: checking train.tokens",
    ]


def test_the_data_of_checkpoints_are_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path)
    output = tmp_path / "run"
    output.mkdir()
    first = prepare_corpus(config(tmp_path), print)
    files = open_build(output / "tokens").record
    assert json.loads((output / module.USED).read_text()) == files
    assert prepare_corpus(config(tmp_path, "data.seed=1"), print).train == first.train
    prepare_corpus(config(tmp_path), print)
    pretend_checkpoint(output)
    assert prepare_corpus(config(tmp_path), print).train == first.train
    for override in ("data.seed=5", "data.held_out=0.3", "data.tokenizer=bpe"):
        key = override.partition("=")[0]
        for use in (prepare_corpus, build_corpus):
            with pytest.raises(DataError, match=f"^{key}: the checkpoints of this run were saved with {key} "):
                use(config(tmp_path, override), print)
        assert open_build(output / "tokens").record == files
    elsewhere = f"data.folder={tmp_path / 'elsewhere'}"
    assert prepare_corpus(config(tmp_path, elsewhere), print).report["tokens"] == first.report["tokens"]
    with pytest.raises(DataError, match=r"data.sources: .* does not hold the token files that this run.s checkpoints"):
        other = build_corpus(config(tmp_path, "data.seed=9", f"output.folder={tmp_path / 'other'}"), print)
        prepare_corpus(config(tmp_path, f"data.sources={other.folder}"), print)
    (tmp_path / "text" / "00.txt").write_text("something else")
    with pytest.raises(DataError, match="not the one that the checkpoints of this run were trained on .files were"):
        prepare_corpus(config(tmp_path), print)
    assert open_build(output / "tokens").record == files


def test_a_run_never_reads_its_own_files(tmp_path: Path) -> None:
    write(tmp_path)
    inside = f"output.folder={tmp_path / 'text' / 'run'}"
    with pytest.raises(DataError, match=r"data.sources: output.folder .*/text/run is inside the source .*data.exclude"):
        prepare_corpus(config(tmp_path, inside, f"data.folder={tmp_path / 'tokens'}"), print)
    prepare_corpus(config(tmp_path, inside, "data.exclude=run"), print)
    tokens = tmp_path / "text" / "run" / "tokens"
    with pytest.raises(DataError, match="token files that `longctx data build` made"):
        prepare_corpus(config(tmp_path), print)
    assert prepare_corpus(config(tmp_path, f"data.sources={tokens}"), print).train == str(tokens / "train.tokens")
