"""Where text comes from: files, folders, JSONL, the Python standard library, Hugging Face datasets.

A source yields named documents in an order that depends on nothing but its content. A file that the user named must
be readable; inside a folder, what is not UTF-8 text is left out and counted.
"""

from __future__ import annotations

import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, Protocol

from longctx.errors import DataError, MissingPackageError

STDLIB = "python-stdlib"
_JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_MAX_TEXT_BYTES = 2**30
_MAX_LINE_BYTES = 2**28


class Document(NamedTuple):
    """One text and where it came from."""

    name: str
    text: str


class Source(Protocol):
    """Something that yields documents, the same ones in the same order each time."""

    skipped: dict[str, str]  # what was left out -> why; filled while reading

    def documents(self) -> Iterator[Document]:
        """Yield every document. Raises: DataError."""
        ...

    def stamp(self) -> list[list[str | int]] | None:
        """Return (path, bytes, time of change) of every file read, or None where that is not known."""
        ...


class Files:
    """Text files and JSONL files.

    Args:
        files: what to read, in order.
        root: names in messages and documents are relative to it.
        field: key of the text in JSONL objects.
        lenient: leave out what is not text instead of raising.
    """

    def __init__(self, files: Sequence[Path], root: Path, field: str = "text", lenient: bool = False) -> None:
        self.files, self.root, self.field, self.lenient = list(files), root, field, lenient
        self.skipped: dict[str, str] = {}

    def stamp(self) -> list[list[str | int]]:
        return [[os.path.abspath(file), (status := file.stat()).st_size, status.st_mtime_ns] for file in self.files]

    def documents(self) -> Iterator[Document]:
        self.skipped = {}
        for file in self.files:
            name = file.relative_to(self.root).as_posix()
            try:
                if str(file).endswith(_JSON_LINES):
                    yield from self._json_lines(file, name)
                else:
                    yield Document(name, read_text(file))
            except DataError as error:
                if not self.lenient:
                    raise
                self.skipped[name] = str(error)

    def _json_lines(self, file: Path, name: str) -> Iterator[Document]:
        offset = 0
        with _opened(file) as raw, gzip.open(raw) if file.suffix == ".gz" else raw as stream:
            number = 0
            while line := _line(stream, file, number + 1):
                number += 1
                if line.strip():
                    yield Document(f"{name}:{number}", self._text(line, f"{file}:{number} (byte {offset})"))
                offset += len(line)

    def _text(self, line: bytes, where: str) -> str:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not a JSON object on one line ({error}); repair or remove the line") from None
        if not isinstance(value, dict) or not isinstance(value.get(self.field), str):
            found = ", ".join(map(repr, list(value)[:8])) if isinstance(value, dict) else type(value).__name__
            raise DataError(
                f"{where}: no text under the key {self.field!r} (found: {found}); give the key that holds the text"
            )
        text: str = value[self.field]
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: half of a surrogate pair at character {error.start}; repair the line") from None
        return text


class HuggingFace:
    """A split of a Hugging Face dataset (a local folder, or a name, which ``datasets`` may download)."""

    def __init__(self, name: str, config: str | None, split: str, field: str = "text") -> None:
        self.name, self.config, self.split, self.field = name, config, split, field
        self.skipped: dict[str, str] = {}

    def stamp(self) -> None:
        return None

    def documents(self) -> Iterator[Document]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise MissingPackageError(
                "the package `datasets` is not installed: `pip install 'longctx[data]'`, or give text files or JSONL"
            ) from None
        try:
            rows = load_dataset(self.name, self.config, split=self.split)
        except Exception as error:  # its errors have no common base
            raise DataError(f"hf:{self.name}: `datasets` cannot load split {self.split!r}: {error}") from None
        for number, row in enumerate(rows):
            text = row.get(self.field)
            if not isinstance(text, str):
                raise DataError(
                    f"hf:{self.name}: row {number} has no text under {self.field!r} (found: {', '.join(row)}); "
                    "give the column that holds the text"
                )
            yield Document(f"{self.name}:{number}", text)


def open_source(given: str | Path, field: str = "text") -> Source:
    """Return the source that ``given`` names.

    Args:
        given: a text file, a ``.jsonl`` (also ``.jsonl.gz``) file, a folder of such, "python-stdlib", or
            "hf:NAME", "hf:NAME:SPLIT", "hf:NAME:CONFIG:SPLIT".
        field: key of the text in JSONL objects and dataset rows.

    Raises:
        DataError: nothing there.
    """
    if str(given) == STDLIB:
        return standard_library()
    if str(given).startswith("hf:"):
        name, *rest = str(given)[3:].split(":")
        if not name or len(rest) > 2:
            raise DataError(f"{given}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
        return HuggingFace(name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train", field)
    path = Path(given).expanduser()
    if path.is_dir():
        files = walk(path)
        if not files:
            raise DataError(f"{path}: the folder holds no files; give a folder with text or JSONL files")
        return Files(files, path, field, lenient=True)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; give text files, JSONL files, folders, {STDLIB!r} or 'hf:NAME' (a dataset)"
        )
    return Files([path], path.parent, field)


def standard_library() -> Source:
    """Return the ``.py`` files of this Python's standard library: some tens of megabytes that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    leave_out = {"site-packages", "dist-packages", "__pycache__"}
    files = [
        file
        for file in walk(root, leave_out)
        if file.suffix == ".py" and not file.name.startswith("_sysconfigdata")  # how this Python was compiled, not text
    ]
    if not files:
        raise DataError(f"{root}: this Python has no readable standard library; give text files instead of {STDLIB!r}")
    return Files(files, root, lenient=True)


def walk(folder: Path, leave_out: set[str] | None = None) -> list[Path]:
    """Return all visible regular files below ``folder``, sorted by path; links to folders are not followed."""
    found = []
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in (leave_out or ())]
        found += [Path(base) / name for name in names if not name.startswith(".")]
    return sorted((file for file in found if file.is_file()), key=lambda file: file.relative_to(folder).as_posix())


def read_text(file: Path) -> str:
    """Read a UTF-8 file exactly (line ends are kept, a byte order mark is not).

    Raises:
        DataError: empty, too large, not readable, or binary (naming the offset).
    """
    with _opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > _MAX_TEXT_BYTES:
            raise DataError(f"{file}: {size} bytes are too large for one document; split it, or make JSONL of it")
        data = stream.read(_MAX_TEXT_BYTES)
    if not data.strip():
        raise DataError(f"{file} is empty (or only blanks); give text")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{file}: offset 0: UTF-16; convert it with `iconv -t UTF-8`")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: offset {error.start}: binary or not UTF-8; give UTF-8 text") from None
    if (offset := data.find(b"\0")) >= 0:
        raise DataError(f"{file}: offset {offset}: binary (a zero byte); give UTF-8 text")
    return text.removeprefix("\ufeff")


def _opened(file: Path) -> BinaryIO:
    try:
        return open(file, "rb")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def _line(stream: IO[bytes] | gzip.GzipFile, file: Path, number: int) -> bytes:
    try:
        line = stream.readline(_MAX_LINE_BYTES + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:  # a damaged .gz
        raise DataError(f"{file}:{number}: cannot be read on: {error}") from None
    if len(line) > _MAX_LINE_BYTES:
        raise DataError(f"{file}:{number}: a line of more than {_MAX_LINE_BYTES} bytes; is this JSONL?")
    return line
