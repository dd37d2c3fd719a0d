"""Writing a token file: all of it or nothing, and the same bytes for the same documents."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from longctx.data.tokens.file import TokenFile
from longctx.data.tokens.format import HEADER_BYTES, parse
from longctx.data.tokens.writer import TokenWriter
from longctx.errors import DataError

from token_files import HASH, write


def test_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a").read_bytes() == write(tmp_path / "b").read_bytes()


def test_token_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="page 7: token 1 is 100, outside the vocabulary of 100"):
        with TokenWriter(tmp_path / "x", vocabulary_size=100, tokenizer_hash=HASH) as writer:
            writer.add([1, 100], "page 7")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ids", [[], [[1]], [1.5], ["a"], [-1]])
def test_what_is_no_document_is_refused(tmp_path: Path, ids: list) -> None:
    with pytest.raises(DataError), TokenWriter(tmp_path / "x", vocabulary_size=9, tokenizer_hash=HASH) as writer:
        writer.add(ids)
    with pytest.raises(DataError, match="no document was added"):
        with TokenWriter(tmp_path / "x", vocabulary_size=9, tokenizer_hash=HASH):
            pass
    assert not list(tmp_path.iterdir())


def test_full_disk_is_named_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x")
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="the disk is full"):
        write(path, vocabulary_size=300)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_ignored_tokens_are_runs_whatever_the_parts(tmp_path: Path) -> None:
    """The mask of a file is that of its documents, however their tokens were appended; without one it is version 1."""
    draw = np.random.default_rng(3)
    masks = [np.repeat(draw.random(9) < 0.5, 7) for _ in range(5)]
    with TokenWriter(tmp_path / "x", vocabulary_size=100, tokenizer_hash=HASH, end_of_document=9) as writer:
        for mask in masks:
            for part in np.array_split(mask, 4):
                writer.append(np.arange(part.size), labels=part)
            writer.end_document(complete=True)
        writer.add([1, 2, 3])  # its end is appended, and is a label
    with TokenFile(tmp_path / "x") as file:
        file.verify()
        expected = ~np.concatenate([*masks, np.ones(4, bool)])
        assert file.is_ignored(np.arange(file.token_count)).tolist() == expected.tolist()
        assert file.ignored_tokens == expected.sum() and file.ignored.size < 2 * 9 * 5
        assert (tmp_path / "x").read_bytes()[8] == 2 and file.document(0).size == 63 and file.document(5)[-1] == 9
    with TokenWriter(tmp_path / "y", vocabulary_size=100, tokenizer_hash=HASH) as writer:
        writer.append([1, 2], labels=np.ones(2, bool))
        writer.end_document()
    assert (tmp_path / "y").read_bytes()[8] == 1 and TokenFile(tmp_path / "y").ignored.size == 0


def test_damaged_borders_of_ignored_tokens_are_refused(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "x", vocabulary_size=100, tokenizer_hash=HASH) as writer:
        writer.append(np.arange(9), labels=np.arange(9) > 3)
        writer.end_document()
    raw = (tmp_path / "x").read_bytes()
    header, body = parse(raw[:HEADER_BYTES], len(raw), tmp_path), bytearray(raw)
    for borders in ([4, 4], [9, 2], [0, 10]):
        body[header.ignored_at :] = np.array(borders, "<u8").tobytes()
        digest = hashlib.sha256(bytes(body[HEADER_BYTES:])).digest()
        body[:HEADER_BYTES] = replace(header, payload_hash=digest).pack()
        (tmp_path / "x").write_bytes(body)
        with pytest.raises(DataError, match="borders of ignored tokens are damaged"):
            TokenFile(tmp_path / "x").verify()
    (tmp_path / "x").write_bytes(replace(header, ignored_count=3).pack() + bytes(body[HEADER_BYTES:]) + bytes(8))
    with pytest.raises(DataError, match="offset 128: 3 borders"):
        TokenFile(tmp_path / "x")
