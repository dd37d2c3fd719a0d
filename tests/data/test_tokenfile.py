"""A token file says what it is; a damaged, foreign or changed one is one DataError, at once and in little memory."""

from __future__ import annotations

import errno
import os
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.rows import PackedRows
from longctx.data.tokens.file import TokenFile
from longctx.data.tokens.format import HEADER_BYTES, MAGIC, Header, parse
from longctx.data.tokens.writer import TokenWriter
from longctx.errors import DataError

HASH = "ab" * 32
DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8]]


def write(path: Path, vocabulary_size: int = 100, end_of_document: int | None = None) -> Path:
    with TokenWriter(
        path, vocabulary_size=vocabulary_size, tokenizer_hash=HASH, end_of_document=end_of_document, metadata={"a": 1}
    ) as writer:
        for number, ids in enumerate(DOCUMENTS):
            writer.add(ids, f"näme {number}")
    return path


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


def test_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a").read_bytes() == write(tmp_path / "b").read_bytes()


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


FOREIGN = {
    b"": "is empty",
    b"\n" * 9: "this is text",
    b"MMIDIDX\0\0" + bytes(400): "Megatron index",
    b"PK\3\4" + bytes(400): "zip archive",
    MAGIC[:6] + b"\n" + bytes(400): "text mode",
    bytes(range(256)) * 4: "not a longctx token file",
    MAGIC: "truncated inside",
    MAGIC + bytes(248): "checksum",
}


@pytest.mark.parametrize("content", FOREIGN)
def test_foreign_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(DataError, match=FOREIGN[content]) as caught:
        TokenFile(path)
    assert str(path) in str(caught.value)


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


def test_version_two_asks_for_an_update(tmp_path: Path) -> None:
    import hashlib

    raw = bytearray(write(tmp_path / "x").read_bytes())
    raw[8:12] = struct.pack("<I", 2)
    raw[224:256] = hashlib.sha256(raw[:224]).digest()
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(DataError, match="version 2, this longctx reads version 1"):
        TokenFile(tmp_path / "x")


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


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 2**40))
def test_random_bytes_are_never_a_header(raw: bytes, size: int) -> None:
    for data in (raw, MAGIC + raw):
        with pytest.raises(DataError):
            parse(data[:HEADER_BYTES], size, Path("x"))


def test_a_hundred_thousand_damaged_headers(tmp_path: Path) -> None:
    raw = write(tmp_path / "x").read_bytes()
    size, header = len(raw), raw[:HEADER_BYTES]
    random = np.random.default_rng(0)
    started = time.process_time()
    for kind, at, value, end in random.integers(0, [3, HEADER_BYTES, 255, HEADER_BYTES], (100_000, 4)).tolist():
        damaged = bytearray(header)
        if kind == 0:
            damaged[at] ^= value + 1
        elif kind == 1:
            damaged[at:end] = random.bytes(max(end - at, 1))
        else:
            del damaged[at : at + 1 + value % 16]
        del damaged[HEADER_BYTES:]
        if damaged == header:
            continue
        with pytest.raises(DataError):
            parse(bytes(damaged), size, tmp_path)
    assert time.process_time() - started < 60


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("token_bytes", 3, "offset 12: 3 bytes per token"),
        ("vocabulary_size", 0, "offset 16: a vocabulary of 0"),
        ("vocabulary_size", 2**16 + 1, "do not fit in uint16"),
        ("end_of_document", 100, "offset 40: end-of-document token 100"),
        ("metadata_bytes", 2**25, "offset 56"),
        ("document_count", 0, "at least one document, and a token in each"),
        ("document_count", 9, "at least one document, and a token in each"),
    ],
)
def test_impossible_fields_are_named(tmp_path: Path, field: str, value: int, words: str) -> None:
    fields = {**TokenFile(write(tmp_path / "x")).header.__dict__, field: value}
    header = Header(**fields)
    (tmp_path / "x").write_bytes(header.pack().ljust(min(header.file_bytes, 2**12), b"\0"))
    with pytest.raises(DataError, match=words):
        TokenFile(tmp_path / "x")


WORD = st.one_of(st.integers(0, 5), st.integers(2**63, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 4096))


@settings(max_examples=400, deadline=None)
@given(
    token_bytes=st.sampled_from([0, 1, 2, 3, 4, 8]),
    counts=st.tuples(WORD, WORD, WORD, WORD, WORD),
    end=st.integers(-3, 300),
    body=st.binary(max_size=600),
)
def test_lying_headers_with_a_true_checksum(
    tmp_path_factory: pytest.TempPathFactory, token_bytes: int, counts: tuple[int, ...], end: int, body: bytes
) -> None:
    """Whoever can compute a checksum still cannot make us allocate or read beyond the file."""
    vocabulary, tokens, documents, names, metadata = counts
    header = Header(token_bytes, vocabulary, tokens, documents, end, names, metadata, bytes(32), bytes(32))
    path = tmp_path_factory.getbasetemp() / "lying.tokens"
    path.write_bytes(header.pack() + body)
    with pytest.raises(DataError), TokenFile(path) as file:
        file.verify()
