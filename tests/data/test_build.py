"""Building: complete or not there, the same from the same text, and never a second time for nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import longctx
from longctx.data.build import build_tokens, open_build
from longctx.data.survey import Survey
from longctx.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from longctx.data.tokens.file import TokenFile
from longctx.data.tokens.writer import TokenWriter
from longctx.errors import DataError

FILES = [".lock", "build.json", "held_out.tokens", "tokenizer", "train.tokens"]


def texts_of(path: Path, tokenizer_folder: Path) -> list[str]:
    tokenizer = load_tokenizer(tokenizer_folder)
    with TokenFile(path, tokenizer_hash=tokenizer.hash) as file:
        return [tokenizer.decode(file.document(number)) for number in range(file.document_count)]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_document_is_on_one_side(corpus: Path, tmp_path: Path, tokenizer: str) -> None:
    built = build_tokens(corpus, tokenizer, tmp_path / "out", vocabulary_size=300, held_out=0.1)
    assert built.held_out is not None and not built.reused
    train, other = (texts_of(path, built.tokenizer) for path in (built.train, built.held_out))
    assert len(other) == 5 and sorted(train + other) == sorted(file.read_text() for file in corpus.iterdir())
    with TokenFile(built.train) as file:
        assert file.tokens[file.offsets[1:] - 1].tolist() == [file.end_of_document] * 45
        assert file.name(0).endswith(".txt") and file.metadata["part"] == "train"
    assert built.report["tokens"] > 0 and built.report["documents"] == 50
    assert open_build(tmp_path / "out").report == built.report


def test_same_text_same_bytes_whatever_the_place(corpus: Path, tmp_path: Path) -> None:
    first = build_tokens(corpus, "bpe", tmp_path / "a", vocabulary_size=300)
    moved = corpus.rename(tmp_path / "moved")
    second = build_tokens(moved, "bpe", tmp_path / "b", vocabulary_size=300)
    with TokenFile(first.train) as one, TokenFile(second.train) as two:
        assert np.array_equal(one.tokens, two.tokens) and np.array_equal(one.offsets, two.offsets)
    assert build_tokens(moved, "bpe", tmp_path / "a", vocabulary_size=300).reused


def test_second_build_is_reused_until_something_changes(corpus: Path, tmp_path: Path) -> None:
    def build(**changes: object) -> bool:
        return build_tokens(corpus, **{"tokenizer": "bytes", "out_folder": tmp_path / "out", **changes}).reused

    assert [build(), build(), build()] == [False, True, True]
    assert [build(seed=1), build(seed=1), build(held_out=0.2), build(tokenizer="bpe")] == [False, True, False, False]
    assert [build(), build(reuse=False), build()] == [False, False, True]
    file = corpus / "03.txt"
    file.write_text("another text of this file")  # just now: times of change prove nothing yet
    assert [build(), build()] == [False, True]
    os.utime(file, (1e9, 1e9))
    file.touch()
    assert build()  # touched, but the same text


def test_damaged_results_are_built_again(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_tokens(corpus, "bytes", out)
    for name in ("train.tokens", "held_out.tokens", "build.json", "tokenizer/tokenizer.json"):
        raw = bytearray((out / name).read_bytes())
        raw[len(raw) // 2] ^= 64
        (out / name).write_bytes(raw)
        if name != "build.json":
            with pytest.raises(DataError, match="no complete token files"):
                open_build(out)
        again = build_tokens(corpus, "bytes", out)
        assert open_build(out).train == again.train
    (out / "train.tokens").unlink()
    assert not build_tokens(corpus, "bytes", out).reused


def test_copies_of_a_text_stay_together(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {number % 20}"}) + "\n" for number in range(200)))
    built = build_tokens(path, "bytes", tmp_path / "out", held_out=0.1)
    assert built.held_out is not None
    train, other = (set(texts_of(part, built.tokenizer)) for part in (built.train, built.held_out))
    assert other and train and not train & other


def test_single_document_is_cut_at_a_line(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(1000))
    (tmp_path / "book.txt").write_text(text)
    built = build_tokens(tmp_path / "book.txt", "bytes", tmp_path / "out", held_out=0.1)
    assert built.held_out is not None
    (train,), (other,) = (texts_of(part, built.tokenizer) for part in (built.train, built.held_out))
    assert train + other == text and train.endswith("\n") and 0.08 < len(other) / len(text) < 0.12
    assert build_tokens(tmp_path / "book.txt", "bytes", tmp_path / "all", held_out=0).held_out is None


def test_held_out_file_goes_when_it_is_no_longer_asked_for(corpus: Path, tmp_path: Path) -> None:
    build_tokens(corpus, "bytes", tmp_path / "out")
    built = build_tokens(corpus, "bytes", tmp_path / "out", held_out=0)
    assert built.held_out is None and not (tmp_path / "out" / "held_out.tokens").exists()


def test_nothing_to_read(tmp_path: Path) -> None:
    folder = tmp_path / "blank"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    (folder / "b.txt").write_bytes(b"  \n")
    with pytest.raises(DataError, match=r"no text in .*blank \(2 files left out; the first: a.png is left out: image"):
        build_tokens(folder, "bytes", tmp_path / "out")
    with pytest.raises(DataError, match="no source of text"):
        build_tokens([], "bytes", tmp_path / "out")
    with pytest.raises(DataError, match="share of held-out documents"):
        build_tokens(folder, "bytes", tmp_path / "out", held_out=0.9)
    (tmp_path / "same.jsonl").write_text('{"text": "a"}\n' * 5)
    with pytest.raises(DataError, match="all 5 documents are the same text"):
        build_tokens(tmp_path / "same.jsonl", "bytes", tmp_path / "out")


def test_output_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose an output folder that you may write to"):
        build_tokens(corpus, "bytes", tmp_path / "file")


def test_text_that_changes_between_passes(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = Survey.held_out

    def meddle(self: Survey, share: float) -> np.ndarray:
        (corpus / "10.txt").write_text("changed")
        return held_out(self, share)

    monkeypatch.setattr(Survey, "held_out", meddle)
    with pytest.raises(DataError, match="10.txt changed while it was being read"):
        build_tokens(corpus, "bytes", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tokens"))


def test_full_disk_leaves_nothing_that_looks_complete(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: TokenWriter, data: bytes) -> None:
        with self._removing_on_error():
            raise OSError(28, "No space left on device")

    build_tokens(corpus, "bytes", tmp_path / "out")
    monkeypatch.setattr(TokenWriter, "_write", full)
    with pytest.raises(DataError, match="the disk is full"):
        build_tokens(corpus, "bytes", tmp_path / "out", seed=1)
    open_build(tmp_path / "out")  # what was there before is still there
    assert sorted(os.listdir(tmp_path / "out")) == FILES


KILLED = """
import sys
from longctx.data.build import build_tokens
print("ready", flush=True)
while True:
    build_tokens(sys.argv[1], "bytes", sys.argv[2], reuse=False)
"""


def test_killed_builds_leave_all_or_nothing(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for trial in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, corpus, out], stdout=subprocess.PIPE, cwd=Path(longctx.__file__).parents[1]
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(0.02 + 0.017 * trial)
        process.kill()
        process.wait()
        process.stdout.close()
        for name in ("train.tokens", "held_out.tokens"):
            if (out / name).exists():
                with TokenFile(out / name) as file:
                    file.verify()
        if (out / "build.json").exists():
            open_build(out)
    assert not build_tokens(corpus, "bytes", out, reuse=False).reused
    open_build(out)
    assert sorted(os.listdir(out)) == FILES


def test_building_needs_neither_torch_nor_transformers(corpus: Path, tmp_path: Path) -> None:
    code = """
import sys
sys.modules.update(torch=None, transformers=None, tokenizers=None)
from longctx.data.build import build_tokens
from longctx.data.inspect import inspect
inspect(build_tokens(sys.argv[1], "bytes", sys.argv[2]).train, sequence_length=64)
"""
    root = Path(longctx.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, corpus, tmp_path / "out"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0 and "best_fit" in done.stdout, done.stderr


def test_files_get_the_permissions_that_the_umask_gives(corpus: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        build_tokens(corpus, "bytes", tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640} and set(FILES) - {"tokenizer"} < set(modes)


def test_a_build_that_fails_leaves_what_was_there(corpus: Path, tmp_path: Path) -> None:
    first = build_tokens(corpus, "bytes", tmp_path / "out")
    (corpus / "zz.parquet").write_bytes(b"<html>404</html>")
    with pytest.raises(DataError, match="zz.parquet: offset 0: its name says parquet"):
        build_tokens(corpus, "bytes", tmp_path / "out")
    assert open_build(tmp_path / "out").record == first.record and sorted(os.listdir(tmp_path / "out")) == FILES


def test_a_complete_folder_that_cannot_be_written_is_used(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_tokens(corpus, "bytes", tmp_path / "out")
    original = os.open

    def read_only(path: object, flags: int, *arguments: object, **keywords: object) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(30, "Read-only file system")
        return original(path, flags, *arguments, **keywords)

    monkeypatch.setattr(os, "open", read_only)
    assert build_tokens(corpus, "bytes", tmp_path / "out").reused
    (corpus / "00.txt").touch()  # read again, the same text
    again = build_tokens(corpus, "bytes", tmp_path / "out")
    assert again.reused and again.record == first.record
    with pytest.raises(DataError, match="out holds other data and cannot be written; choose another data.folder"):
        build_tokens(corpus, "bytes", tmp_path / "out", seed=1)
    with pytest.raises(DataError, match="elsewhere cannot be written: Read-only file system"):
        build_tokens(corpus, "bytes", tmp_path / "elsewhere")


def test_documents_without_any_token_are_counted(corpus: Path, tmp_path: Path) -> None:
    class Deaf(ByteTokenizer):
        def encode_batch(self, texts: Sequence[str], *, parse: bool = False) -> list[np.ndarray]:
            return [ids[ids < 48] if ids.size < 12 else ids for ids in super().encode_batch(texts, parse=parse)]

    (corpus / "a.txt").write_text("nothing")
    built = build_tokens(corpus, Deaf(), tmp_path / "out", held_out=0.1)
    with TokenFile(built.train) as train:
        assert built.report["without_tokens"] == 1
        assert built.report["documents"] == 51 == 1 + train.document_count + built.report["held_out_documents"]
