"""From the data section to token files: what was left out is said, and the data that checkpoints count stay."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_run import config, write

from longctx.data.build import open_build
from longctx.data.tokens.file import TokenFile
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


def test_long_documents_and_masks_are_counted_and_said(tmp_path: Path) -> None:
    write(tmp_path)
    said: list[str] = []
    built = build_corpus(config(tmp_path, "data.sequence_length=100"), said.append)
    with TokenFile(built.train) as file:
        lengths = np.diff(file.offsets)
    long, beyond = int((lengths > 100).sum()), int(np.maximum(lengths - 100, 0).sum())
    assert long and built.report["longer_than_row"] == long and built.report["tokens_beyond_row"] == beyond
    line = f"data: {long} documents are longer than data.sequence_length 100 and are "
    assert any(text.startswith(f"{line}split; {beyond:,} of their tokens are in rows without their") for text in said)
    for choice, words in (("truncate", f"truncated, which leaves out {beyond:,} tokens"), ("drop", "left out, with")):
        build_corpus(config(tmp_path, "data.sequence_length=100", f"data.long_documents={choice}"), said.append)
        assert said[-1].startswith(line + words)
    said.clear()
    build_corpus(config(tmp_path, "data.sequence_length=4096", "data.loss=completion"), said.append)
    assert "data: data.loss has no effect: no document is a conversation, and all tokens of texts are labels" in said
    assert not any("longer than data.sequence_length" in line for line in said)
    rows = [{"prompt": "a", "completion": f"b{number}"} for number in range(10)]
    (tmp_path / "text" / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = build_corpus(config(tmp_path), said.append).report
    labels = report["tokens"] + report["held_out_tokens"] - report["ignored_tokens"]
    assert f"data: 10 conversations; {labels:,} of all tokens are labels (data.loss: assistant)" in said


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
