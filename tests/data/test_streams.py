"""Streams: decompressed and decoded in parts, and every fault named with its position."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from longctx.data.sources import streams
from longctx.data.sources.text import open_source
from longctx.errors import DataError


def read(path: Path, **options: object) -> list[tuple[str, str]]:
    return [(document.name, document.text) for document in open_source(path, **options).documents()]


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    damaged = {whole[:-20]: "cannot be read on", b"no gzip": "its name says gzip, its first bytes do not"}
    for content, words in (damaged | {whole[:20] + b"\0\0\0" + whole[23:]: "cannot be read on"}).items():
        (tmp_path / "x.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=words):
            read(tmp_path / "x.jsonl.gz")


COMPRESSED = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_compressions_are_recognised_and_the_suffix_is_that_of_the_content(tmp_path: Path, suffix: str) -> None:
    compress: Callable[[bytes], bytes] = COMPRESSED[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(b"first\nsecond"))
    with streams.opened(path) as stream:
        assert (stream.suffix, stream.head, stream.whole) == (".jsonl", b"first\nsecond", True)
        assert list(map(bytes, stream.lines(100))) == [b"first\n", b"second"]
        stream.rewind()
        assert "".join(stream.text()) == "first\nsecond"


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_characters_and_lines_may_cross_the_borders_of_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    text = "\ufeffzwei – ß 🙂\r\n\nlast"
    monkeypatch.setattr(streams.Stream.read, "__defaults__", (chunk,))
    (tmp_path / "a.txt").write_bytes(text.encode())
    with streams.opened(tmp_path / "a.txt") as stream:
        assert "".join(stream.text()) == text.removeprefix("\ufeff")
        stream.rewind()
        assert b"".join(stream.lines(100)) == text.encode()
        stream.rewind()
        with pytest.raises(DataError, match=r"a.txt:1: a line of more than 5 bytes"):
            list(stream.lines(5))


@pytest.mark.parametrize(("content", "blank"), [(b"", True), (b"\xef\xbb\xbf \n\t", True), (b" \n x", False)])
def test_blank_files(tmp_path: Path, content: bytes, blank: bool) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with streams.opened(tmp_path / "a.txt") as stream:
        assert stream.blank() is blank


def test_the_offset_of_a_zero_byte_counts_from_the_start_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams.Stream.read, "__defaults__", (4,))
    (tmp_path / "a.txt").write_bytes(b"0123456\0")
    with streams.opened(tmp_path / "a.txt") as stream, pytest.raises(DataError, match="offset 7: binary"):
        list(stream.text())
