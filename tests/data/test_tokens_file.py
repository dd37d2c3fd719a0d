"""A token file says what it is; a damaged, foreign or changed one is one DataError, at once and in little memory."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from longctx.data.rows import PackedRows
from longctx.data.tokens.file import TokenFile
from longctx.data.tokens.format import HEADER_BYTES, Header, parse
from longctx.data.tokens.writer import TokenWriter
from longctx.errors import DataError

from token_files import DOCUMENTS, HASH, write


@pytest.mark.parametrize(("vocabulary_size", "kind"), [(100, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")])
def test_what_is_written_is_read(tmp_path: Path, vocabulary_size: int, kind: str) -> None:
    path = write(tmp_path / "x.tokens", vocabulary_size, end_of_document=9)
    with TokenFile(path, tokenizer_hash=HASH, vocabulary_size=vocabulary_size) as file:
        file.verify()
        assert [file.document(i).tolist() for i in range(3)] == [ids + [9] for ids in DOCUMENTS]
        assert [file.name(i) for i in range(3)] == ["näme 0", "näme 1", "näme 2"]
        assert (file.tokens.dtype, file.vocabulary_size, file.end_of_document) == (kind, vocabulary_size, 9)
        assert (file.tokenizer_hash, file.metadata["a"]) == (HASH, 1)
        with pytest.raises(ValueError):  # mapped read-only
            file.tokens[0] = 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.tokens"]
    assert path.stat().st_mode & 0o777 == 0o644  # other users of a cluster may read it


def test_largest_token_of_each_width_survives(tmp_path: Path) -> None:
    for vocabulary_size in (2**16, 2**32):
        with TokenWriter(tmp_path / "x", vocabulary_size=vocabulary_size, tokenizer_hash=HASH) as writer:
            writer.add(np.array([0, vocabulary_size - 1], dtype=np.uint64))
        assert TokenFile(tmp_path / "x").tokens.tolist() == [0, vocabulary_size - 1]


def test_ten_gigabytes_open_at_once(tmp_path: Path) -> None:
    count = 5 * 10**9
    header = Header(2, 100, count, 1, -1, 0, 2, bytes(32), bytes(32))
    with open(tmp_path / "x", "wb") as stream:  # a sparse file: zeros take no room
        stream.write(header.pack())
        stream.seek(header.offsets_at)
        stream.write(np.array([0, count, 0, 0], "<u8").tobytes())
        stream.seek(header.metadata_at)
        stream.write(b"{}")
    tracemalloc.start()
    started = time.perf_counter()
    with TokenFile(tmp_path / "x") as file:
        rows = PackedRows(file, 8192, "concat")
        part = rows.read(len(rows) - 2, np.arange(4096))
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == -(-count // 8192) and part.labels.size == 4096
    assert seconds < 0.5 and peak < 2**21


def test_missing_and_folder(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none", "does not exist"), (tmp_path, "not a regular file")):
        with pytest.raises(DataError, match=words):
            TokenFile(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    raw = write(tmp_path / "x").read_bytes()
    for size in range(len(raw)):
        (tmp_path / "cut").write_bytes(raw[:size])
        with pytest.raises(DataError, match="truncated|empty"):
            TokenFile(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(raw + b"\0")
    with pytest.raises(DataError, match="1 bytes follow the end"):
        TokenFile(tmp_path / "cut")


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    raw = write(tmp_path / "x").read_bytes()
    for bit in range(len(raw) * 8):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        if bit < HEADER_BYTES * 8:
            with pytest.raises(DataError):
                parse(bytes(flipped[:HEADER_BYTES]), len(raw), tmp_path)
        elif bit % 5 == 0:
            (tmp_path / "flipped").write_bytes(flipped)
            with pytest.raises(DataError), TokenFile(tmp_path / "flipped") as file:
                file.verify()


def test_wrong_tokenizer_and_small_vocabulary(tmp_path: Path) -> None:
    path = write(tmp_path / "x")
    with pytest.raises(DataError, match="written with tokenizer abababababab, but the run uses cdcdcdcdcdcd"):
        TokenFile(path, tokenizer_hash="cd" * 32)
    with pytest.raises(DataError, match="vocabulary is 99: make the model's vocabulary at least 100"):
        TokenFile(path, vocabulary_size=99)


def test_change_under_a_running_job(tmp_path: Path) -> None:
    path = write(tmp_path / "x")
    file = TokenFile(path)
    file.check_unchanged()
    write(path, vocabulary_size=200)  # renamed over: the mapping keeps the old file
    file.check_unchanged()
    assert file.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and file.vocabulary_size == 100
    file = TokenFile(path)
    with open(path, "r+b") as stream:
        stream.truncate(300)
    with pytest.raises(DataError, match="was written to while in use"):
        file.check_unchanged()
