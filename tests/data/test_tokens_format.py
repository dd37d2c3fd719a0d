"""The header of a token file: damaged, foreign and impossible ones are one DataError each."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.tokens.file import TokenFile
from longctx.data.tokens.format import HEADER_BYTES, MAGIC, Header, parse
from longctx.errors import DataError

from token_files import write

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


def test_a_newer_version_asks_for_an_update(tmp_path: Path) -> None:
    import hashlib

    raw = bytearray(write(tmp_path / "x").read_bytes())
    raw[8:12] = struct.pack("<I", 3)
    raw[224:256] = hashlib.sha256(raw[:224]).digest()
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(DataError, match="version 3, this longctx reads versions 1 to 2"):
        TokenFile(tmp_path / "x")


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
