"""The text in JSON: long strings, which are never parsed as a whole, come out as the json module reads them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from longctx.data.sources import jsontext
from longctx.data.sources.text import open_source
from longctx.errors import DataError

PARTS = ["a", "é", "語", "\U0001f600", '"', "\\", "\n", "\x01", "/", "u0041", "\\ud83d", "{", "]"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything above 40 bytes is large, and a long string is decoded 16 bytes at a time."""
    monkeypatch.setattr(jsontext, "_LARGE", 40)
    monkeypatch.setattr(jsontext, "_LONG_STRING", 20)
    monkeypatch.setattr(jsontext, "_PART_BYTES", 16)


def read(path: Path) -> list[str]:
    return [document.text for document in open_source(path).documents()]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("write", [lambda rows, dump: "\n".join(map(dump, rows)), lambda rows, dump: dump(rows)])
def test_any_text_is_read_as_json_reads_it(tmp_path: Path, ascii_only: bool, write: Callable) -> None:
    draw = random.Random(2)
    texts = ["".join(draw.choices(PARTS, k=draw.randrange(1, 200))) for _ in range(60)]
    rows = [{"id": text[:60], "text": text, "more": {"text": [text]}} for text in texts]
    (tmp_path / "x.json").write_text(write(rows, lambda value: json.dumps(value, ensure_ascii=ascii_only)))
    assert read(tmp_path / "x.json") == texts


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (r'{"text": "' + "a" * 50 + r'\ud83d and more"}', "half of a surrogate pair"),
        (r'{"text": "' + "a" * 50 + r'\x"}', "not a JSON object on one line"),
        ('{"text": "' + "a" * 50 + '\t"}', "not a JSON object on one line.*control character"),
        ('{"text": "' + "a" * 50 + '\n"}', ":1 .byte 0.: not a JSON object on one line"),
        ('{"text": "' + "a" * 50 + '", }', "not a JSON object on one line"),
        ('{"body": "' + "a" * 50 + '"}', "no text under the key 'text' .found: 'body'"),
        ('{"text": null, "x": "' + "a" * 50 + '"}', "the value of the key 'text' is null"),
    ],
)
def test_mistakes_in_long_lines_are_named(tmp_path: Path, raw: str, words: str) -> None:
    (tmp_path / "x.jsonl").write_text(raw)
    with pytest.raises(DataError, match=words):
        read(tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl").write_bytes(b'{"text": "' + b"a" * 50 + b'\xff\xff and more"}')
    with pytest.raises(DataError, match="not a JSON object on one line"):
        read(tmp_path / "y.jsonl")


def test_lines_and_objects_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsontext, "MAX_BYTES", 2**20)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "' + "a" * 2**22 + '"}\n')
    with pytest.raises(DataError, match="x.jsonl:2: a line of more than 1048576 bytes"):
        read(tmp_path / "x.jsonl")
    (tmp_path / "x.json").write_text('[{"text": "a"}, {"text": "' + "a" * 2**22 + '"}]\n')
    with pytest.raises(DataError, match="x.json: byte 16: an object of more than 1048576 bytes"):
        read(tmp_path / "x.json")
