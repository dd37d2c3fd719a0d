"""Recognise the format of a file by its first bytes; its name decides only if the bytes are ambiguous.

Files without text by nature (images, sound, programs) are left out of folders. Files that may hold text but cannot be
read here (archives, other data formats, damaged files) are an error: text is never lost silently.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import PurePath

from longctx.data.tokens.format import MAGIC as TOKENS
from longctx.errors import DataError

HEAD_BYTES = 2**16
ZSTD = b"\x28\xb5\x2f\xfd"
TEXT, JSON_LINES, JSON, TABLE, PARQUET, ARROW = "text", "JSON lines", "JSON", "table", "parquet", "Arrow"

_UNPACK, _CONVERT = "unpack it", "convert it to JSON lines or parquet"
# (first bytes, what, fix, suffixes of it): files that may hold text which is not read here
_UNREADABLE: tuple[tuple[bytes, str, str, tuple[str, ...]], ...] = (
    (b"PK\x03\x04", "a ZIP archive (also .docx, .xlsx, .epub, .npz, .pt)", _UNPACK, (".zip",)),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK, (".7z",)),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK, (".rar",)),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "decompress it: lz4 -d", (".lz4",)),
    (b"\x1f\x9d", "compressed with compress", "decompress it: gunzip", (".Z",)),
    (b"FEA1", "an Arrow file of the first version", _CONVERT, ()),
    (b"ORC", "an ORC file", _CONVERT, (".orc",)),
    (b"Obj\x01", "an Avro file", _CONVERT, (".avro",)),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _CONVERT, (".h5", ".hdf5")),
    (b"\x93NUMPY", "a NumPy array", _CONVERT, (".npy",)),
    (b"SQLite format 3\0", "an SQLite database", _CONVERT, (".sqlite",)),
    (b"%PDF-", "a PDF file", "convert it: pdftotext", (".pdf",)),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", "convert it to text", ()),
    (TOKENS, "a token file of longctx", "give the folder that `longctx data build` made as the only source", ()),
    (b"MMIDIDX\x00\x00", "a Megatron index", "give it as a source of its own, or set data.format: tokens", ()),
    (b"version https://git-lfs.", "a pointer of Git LFS instead of the data", "fetch it: git lfs pull", ()),
)
# Suffixes of formats that are read here; a file with other content is damaged or misnamed.
_ARROW = (b"ARROW1", b"\xff\xff\xff\xff")  # a file, a stream
_PROMISES: dict[str, tuple[tuple[bytes, ...], str]] = {
    ".gz": ((b"\x1f\x8b",), "gzip"),
    ".bz2": ((b"BZh",), "bzip2"),
    ".xz": ((b"\xfd7zXZ\0",), "xz"),
    ".zst": ((ZSTD,), "zstd"),
    ".parquet": ((b"PAR1",), "parquet"),
    ".arrow": (_ARROW, "Arrow"),
    ".feather": ((*_ARROW, b"FEA1"), "Arrow"),
}
# (offset, bytes, kind): files without text
_NOT_TEXT: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "image"),
    (0, b"\xff\xd8\xff", "image"),
    (0, b"GIF8", "image"),
    (0, b"BM", "image"),
    (0, b"II*\0", "image"),
    (0, b"MM\0*", "image"),
    (0, b"\0\0\1\0", "image"),
    (0, b"8BPS", "image"),
    (0, b"RIFF", "image, sound or film"),
    (4, b"ftyp", "image, sound or film"),
    (0, b"\x1aE\xdf\xa3", "film"),
    (0, b"ID3", "sound"),
    (0, b"\xff\xfb", "sound"),
    (0, b"OggS", "sound"),
    (0, b"fLaC", "sound"),
    (0, b"wOFF", "font"),
    (0, b"wOF2", "font"),
    (0, b"OTTO", "font"),
    (0, b"\0\1\0\0\0", "font"),
    (0, b"\x7fELF", "program"),
    (0, b"MZ", "program"),
    (0, b"\0asm", "program"),
    (0, b"\xca\xfe\xba\xbe", "program"),
    (0, b"\xcf\xfa\xed\xfe", "program"),
    (2, b"\r\r\n", "program"),  # compiled Python
)
_UTF_32, _UTF_16 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), (b"\xff\xfe", b"\xfe\xff")
_OBJECT = re.compile(r'\{\s*"(?:[^"\\\n]|\\.)*"\s*:')
_ARRAY = re.compile(r'\[\s*\{\s*"(?:[^"\\\n]|\\.)*"\s*:|\[\s*\{\s*$')
_COLUMN = re.compile(r'\s*"?[^\W\d][\w.-]{0,63}"?\s*')
_LINE_SUFFIXES, _JSON_SUFFIXES = (".jsonl", ".ndjson"), (".json",)
_TABLE_SUFFIXES = {".csv": ",;\t|", ".tsv": "\t", ".tab": "\t"}


def left_out(head: bytes) -> str | None:
    """Return the kind of a file without text that begins with ``head`` ("image", "program", …), or None."""
    if b"\0" not in head:  # text may begin with BM or RIFF, too
        return None
    return next((what for place, mark, what in _NOT_TEXT if head.startswith(mark, place)), None)


def refuse_unreadable(head: bytes, file: PurePath, suffix: str) -> None:
    """Raise DataError, with what the file is and the fix, unless its text can be read here.

    Args:
        head: the first bytes of the file, decompressed.
        file: its path, for messages.
        suffix: of its name, without that of a compression.
    """
    for mark, what, fix, suffixes in _UNREADABLE:
        if head.startswith(mark) and (not mark.isalnum() or not is_text(head)):
            raise DataError(f"{file}: offset 0: this is {what}, which is not read here; {fix}")
        if suffix in suffixes:
            raise DataError(f"{file}: its name says that it is {what}, its first bytes do not; copy it again")
    if head[257:262] == b"ustar":
        raise DataError(f"{file}: offset 257: this is a tar archive, which is not read here; {_UNPACK}")
    for name, marks in (("UTF-32", _UTF_32), ("UTF-16", _UTF_16)):
        if head.startswith(marks):
            raise DataError(f"{file}: offset 0: {name}; convert it with `iconv -f {name} -t UTF-8`")
    for start, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        zeros, others = head[start::2].count(0), head[1 - start :: 2].count(0)
        if len(head) >= 16 and zeros > 0.4 * len(head[start::2]) and not others and head[:2] != b"\0\0":
            raise DataError(
                f"{file}: offset {start}: it looks like {name} without a byte order mark; convert it with "
                f"`iconv -f {name} -t UTF-8`"
            )


def has_mark(head: bytes) -> bool:
    """Return whether a file begins with the mark of a format that is not read here."""
    return any(head.startswith(mark) for mark, *_ in _UNREADABLE)


def require_promise(head: bytes, file: PurePath) -> None:
    """Raise DataError if the file's suffix (.gz, .parquet …) contradicts its first bytes."""
    marks, what = _PROMISES.get(file.suffix, ((b"",), ""))
    if not head.startswith(marks):
        raise DataError(
            f"{file}: offset 0: its name says {what}, its first bytes do not; it is damaged or misnamed: copy it "
            "again, or rename it"
        )


def columnar(head: bytes) -> str | None:
    """Return ``PARQUET`` or ``ARROW`` if a file with these first bytes is one, else None."""
    if head.startswith(b"PAR1") and not is_text(head):
        return PARQUET
    return ARROW if head.startswith(_ARROW) and not is_text(head) else None


def recognise(head: bytes, whole: bool, file: PurePath, suffix: str, field: str | None) -> tuple[str, str]:
    """Return the reader for a readable file.

    Args:
        head: the first bytes of the file, decompressed; ``whole``: the file has no more.
        file, suffix: as for ``refuse_unreadable``.
        field: the key or column of the text, if one is read.

    Returns:
        ``TEXT``, ``JSON_LINES``, ``JSON`` (an array of objects, or objects one after another), ``TABLE``, ``PARQUET``
        or ``ARROW``; and the delimiter of a table.
    """
    if kind := columnar(head):
        return kind, ""
    text = head.decode(errors="ignore").removeprefix("\ufeff").lstrip()
    if suffix in _LINE_SUFFIXES:
        pretty = not _first_line_is_object(text, whole) and (
            _ARRAY.match(text) or re.match(r'\{\s*\n\s*"', text) is not None
        )
        return (JSON if pretty else JSON_LINES), ""
    if text[:1] in ("{", "["):
        if _first_line_is_object(text, whole):
            return JSON_LINES, ""
        if suffix in _JSON_SUFFIXES or _OBJECT.match(text) or _ARRAY.match(text):
            return JSON, ""
    delimiter = _delimiter(text, whole, suffix, field)
    if suffix in _JSON_SUFFIXES and not delimiter:
        raise DataError(f"{file}: offset 0: its name says JSON, but it begins with {text[:20]!r}; repair or rename it")
    return (TABLE, delimiter) if delimiter else (TEXT, "")


def _first_line_is_object(text: str, whole: bool) -> bool:
    line, end, _ = text.partition("\n")
    if not end and not whole:  # a first line longer than the head
        return _OBJECT.match(line) is not None
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _delimiter(text: str, whole: bool, suffix: str, field: str | None) -> str:
    """Return the delimiter if the text is a table with a header line, else an empty string."""
    lines = text.splitlines(keepends=True)
    if not whole and len(lines) > 1:
        lines.pop()  # it may be incomplete
    header = lines[0] if lines else ""
    if suffix in _TABLE_SUFFIXES:
        return max(_TABLE_SUFFIXES[suffix], key=header.count)
    return next((mark for mark in ",\t;|" if mark in header and _is_table(lines, mark, field)), "")


def _is_table(lines: list[str], delimiter: str, field: str | None) -> bool:
    """Return whether lines are a table: a header of names (known ones, or at least three) and rows of equal width."""
    header = lines[0].rstrip("\r\n").split(delimiter)
    if not all(_COLUMN.fullmatch(name) for name in header) or len(set(header)) < len(header):
        return False
    rows = list(_rows(lines, delimiter))
    names = {name.strip().strip('"') for name in header}
    named = field in names or {"prompt", "completion"} <= names
    enough = len(rows) >= 2 if named else len(rows) >= 4 and len(header) >= 3
    return enough and all(len(row) == len(header) for row in rows)


def _rows(lines: list[str], delimiter: str) -> Iterator[list[str]]:
    try:
        for row in csv.reader(lines, delimiter=delimiter, strict=True):
            if row:
                yield row
    except csv.Error:  # a last field that continues after the head
        return


def is_text(head: bytes) -> bool:
    """Return whether a file with these first bytes is UTF-8."""
    try:
        codecs.utf_8_decode(head, "strict", False)  # its last character may be incomplete
    except UnicodeDecodeError:
        return False
    return b"\0" not in head
