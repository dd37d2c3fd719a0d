"""Formats are recognised by content: read right whatever the name says, or refused with the fix; never as markup."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from longctx.data.sources.text import open_source
from longctx.errors import DataError, MissingPackageError

ROWS = [{"text": "first, with a comma"}, {"text": 'sec"ond\nline', "id": 2}, {"id": 3, "text": "dritte – ß"}]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'id,text\n1,"first, with a comma"\n2,"sec""ond\nline"\n3,dritte – ß\n'


def read(path: Path, **options: object) -> list[str]:
    return [document.text for document in open_source(path, **options).documents()]


SAME_ROWS = {
    "x.jsonl": LINES,
    "x.json": LINES,
    "x.txt": LINES,
    "noname": LINES,
    "bom.json": "\ufeff" + LINES,
    "array.json": json.dumps(ROWS),
    "array.jsonl": json.dumps(ROWS, indent=1),
    "array.txt": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "pretty.json": "\n".join(json.dumps(row, indent=4) for row in ROWS),
    "pretty.jsonl": "\n".join(json.dumps(row, indent=4) for row in ROWS),
    "x.csv": CSV,
    "semicolons.csv": 'id;text\n1;first, with a comma\n2;"sec""ond\nline"\n3;dritte – ß\n',
    "x.tsv": CSV.replace("1,", "1\t").replace("2,", "2\t").replace("3,", "3\t").replace("id,", "id\t"),
    "csv.txt": CSV,
    "csv.json.txt": "\ufeff" + CSV.replace("\n3", "\r\n3"),
}


@pytest.mark.parametrize("pack", [None, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", SAME_ROWS)
def test_rows_are_found_whatever_the_name_says(tmp_path: Path, name: str, pack: object) -> None:
    suffix = {None: "", gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz"}[pack]
    raw = SAME_ROWS[name].encode()
    (tmp_path / (name + suffix)).write_bytes(pack(raw) if callable(pack) else raw)
    assert read(tmp_path / (name + suffix)) == TEXTS
    assert read(tmp_path) == TEXTS
    if callable(pack):  # without the suffix it is compressed all the same
        (tmp_path / (name + suffix)).rename(tmp_path / name)
        assert read(tmp_path) == TEXTS


@pytest.mark.parametrize(
    "text",
    [
        "Roses, red\nViolets, blue\nSugar, sweet\n",
        "[Chapter 1]\n{not json}\n",
        "{\\rtf1 text}",
        "import a, b\nimport c, d\nimport e, f\n",
        "BMW builds cars. ID3 tags, RIFF and ORC are words, too.",
        "ORC",
        "PAR1 is a word here",
        "# Heading\n\n| a | b |\n|---|---|\n",
        "<html><body>text</body></html>",
    ],
)
def test_prose_code_and_markup_stay_as_they_are(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.md").write_text(text)
    assert read(tmp_path) == [text]


def test_files_are_read_as_they_are_when_asked_for(tmp_path: Path) -> None:
    for name, text in (("package.json", '{\n "name": "x"\n}\n'), ("rows.csv", CSV), ("rows.jsonl", LINES)):
        (tmp_path / name).write_text(text)
    (tmp_path / "template.json").write_text("{% if x %}")
    assert read(tmp_path, format="text") == ['{\n "name": "x"\n}\n', CSV, LINES, "{% if x %}"]
    with pytest.raises(DataError, match=r"no text under the key 'text' \(found: 'name'\).*data.format: text"):
        read(tmp_path)


REFUSED = {
    "a.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "its name says parquet"),
    "a.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "b.txt": (b"PK\x03\x04\x14\0\0\0", "a ZIP archive.*unpack it"),
    "c.jsonl.zst": (b'{"text": "a"}', "its name says zstd"),
    "d.arrow": (b"x", "its name says Arrow"),
    "e": (b"%PDF-1.7\n", "pdftotext"),
    "f.txt": ("ein Text".encode("utf-16"), "UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`"),
    "g.txt": ("ein Text".encode("utf-16-le"), "UTF-16LE without a byte order mark"),
    "h.txt": ("ein Text, größer".encode("utf-16-be"), "UTF-16BE without a byte order mark"),
    "i.txt": ("ein Text".encode("utf-32"), "UTF-32"),
    "j.txt": ("größer".encode("latin-1"), "offset 2: binary or not UTF-8.*iconv"),
    "k.txt": (b"some text, then \0", "offset 16: binary"),
    "l.bin": (bytes(range(256)), "offset"),
    "m.json": (b"text, not JSON", "its name says JSON, but it begins with 'text, not JSON'"),
    "n.json": (b'[{"text": "a"}, {"text": ', "the JSON ends too early"),
    "o.json": (b'[{"text": "a"}] {"text": "b"}', "byte 16.*where an object or the end should be"),
    "p.json": (b'["a", "b"]', "only JSON objects, JSON lines and arrays of objects"),
    "q.json": (b'{"text": "a"}\n{"text": ', ":2 .byte 14.: not a JSON object on one line"),
    "r.csv": (b"id,body\n1,a\n", "no column 'text' .found: 'id', 'body'.*data.text_field"),
    "s.csv": (b"id,text\n1,a\n2\n", ":3: row 2 has 1 columns, the header 2"),
    "t.csv": (b'id,text\n1,"a\n2,b\n', "not a table .unexpected end of data"),
    "u.csv": (b"text,text\na,b\n", "no column 'text'"),
    "v.txt": (b"id,name,value\n1,a,b\n2,c,d\n3,e,f\n", "no column 'text'.*data.format: text"),
    "w.gz": (gzip.compress(b"x" * 257 + b"ustar"), "a tar archive.*unpack it"),
    "x.tokens": (b"\x89LCTOK\r\n" + bytes(300), "a token file of longctx"),
    "y.npz": (b"PK\x03\x04", "a ZIP archive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_an_error_in_a_folder_too(tmp_path: Path, name: str) -> None:
    content, words = REFUSED[name]
    (tmp_path / "README.md").write_text("This folder holds data.")
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=words) as caught:
            read(source)
        assert str(tmp_path / name) in str(caught.value)
    assert read(tmp_path, exclude=[name]) == ["This folder holds data."]


class FakeParquet:
    """Stands in for ``pyarrow.parquet.ParquetFile``: what we ask of it is the schema's names and batches of columns."""

    def __init__(self, path: Path, page_checksum_verification: bool) -> None:
        assert page_checksum_verification
        raw = Path(path).read_bytes()
        if raw[-4:] != b"PAR1":
            raise OSError("Parquet magic bytes not found in footer")
        self.rows = json.loads(raw[5:-4])
        self.schema_arrow = types.SimpleNamespace(names=list(self.rows[0]))

    def __enter__(self) -> FakeParquet:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def iter_batches(self, batch_size: int, columns: list[str]) -> Iterator[object]:
        for row in self.rows:
            yield types.SimpleNamespace(to_pylist=lambda row=row: [{name: row[name] for name in columns}])


def test_parquet_is_read_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("A data set.")
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1\xff" + json.dumps(ROWS[1:]).encode() + b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingPackageError, match=r"rows.parquet: reading parquet needs the package `pyarrow`"):
        read(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(ParquetFile=FakeParquet))
    assert read(tmp_path) == ["A data set.", *TEXTS[1:]]
    with pytest.raises(DataError, match=r"no column 'body' \(found: 'text', 'id'\)"):
        read(tmp_path, field="body")
    for rows, words in (([{"text": "a"}, {"text": None}], "row 2: 'text' is null"), ([{"text": 5}], "'text' is int")):
        path.write_bytes(b"PAR1\xff" + json.dumps(rows).encode() + b"PAR1")
        with pytest.raises(DataError, match=words):
            read(tmp_path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="damaged: Parquet magic bytes not found in footer"):
        read(tmp_path)
