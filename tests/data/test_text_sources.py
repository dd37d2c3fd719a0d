"""Sources of text: the same documents in the same order each time, and bad input named with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from longctx.data.sources.text import open_source
from longctx.errors import DataError


def read(path: Path, **options: object) -> list[tuple[str, str]]:
    return [(document.name, document.text) for document in open_source(path, **options).documents()]


def test_file_is_one_document_read_exactly(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffLine\r\n  zwei – ß\n".encode())
    assert read(tmp_path / "a.txt") == [("a.txt", "Line\r\n  zwei – ß\n")]


BAD = {
    b"": "is empty",
    b" \n\t": "is empty",
    b"abc\0def": "offset 3: binary",
    b"good \xff\xfe": "offset 5: binary or not UTF-8",
    "text".encode("utf-16"): "offset 0: UTF-16",
}


@pytest.mark.parametrize("content", BAD)
def test_named_file_must_be_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=BAD[content]) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_folder_is_sorted_and_leaves_out_what_is_not_text(tmp_path: Path) -> None:
    for name in ("b/z.txt", "b/a.md", "a.txt", ".hidden", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "loop").symlink_to(tmp_path)
    source = open_source(tmp_path)
    for _ in range(2):
        assert [document.name for document in source.documents()] == ["a.txt", "b/a.md", "b/z.txt"]
        assert source.skipped == {
            ".git": ("hidden", 1, 11),
            ".hidden": ("hidden", 1, 7),
            "b/image.png": ("image", 1, 10),
        }


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    lines = "\n".join([json.dumps({"text": "eins"}), "", json.dumps({"text": "zw\nei", "id": 3})])
    path.write_bytes(gzip.compress(lines.encode()) if suffix.endswith("gz") else lines.encode())
    assert read(path) == [(f"x{suffix}:1", "eins"), (f"x{suffix}:3", "zw\nei")]


BAD_LINES = {
    b'{"text": "a"}\n{"text": \n': r":2 \(byte 14\): not a JSON object",
    b'{"body": "a"}': r"no text under the key 'text' \(found: 'body'\)",
    b"[1]": "found: list",
    b'{"text": 5}': "the value of the key 'text' is a number, not text",
    b'{"text": null}': "the value of the key 'text' is null, not text",
    b'{"text": "\\ud800"}': "half of a surrogate pair",
    b"[" * 20000: "not a JSON object",
    b"\xff\xff": "not a JSON object",
}


@pytest.mark.parametrize("content", BAD_LINES)
def test_bad_lines_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=BAD_LINES[content]):
        read(tmp_path / "x.jsonl")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; give text files"):
        open_source(tmp_path / "none.txt")
    with pytest.raises(DataError, match="the folder holds no files"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="write hf:NAME"):
        open_source("hf:a:b:c:d")


def test_standard_library_is_megabytes_of_python() -> None:
    names, size = [], 0
    for document in open_source("python-stdlib").documents():
        names.append(document.name)
        size += len(document.text)
    assert size > 5e6 and names == sorted(names) and "json/decoder.py" in names
    assert not [name for name in names if "site-packages" in name or not name.endswith(".py")]
