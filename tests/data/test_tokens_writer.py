"""Writing a token file: all of it or nothing, and the same bytes for the same documents."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

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
