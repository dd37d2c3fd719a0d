"""Open sources of text: files, folders, the Python standard library, Hugging Face datasets.

A source yields named documents in an order that depends only on its content. Formats are recognised by content
(formats.py). A file that cannot be read is an error, in a folder too; files without text by nature are left out of
folders and listed.
"""

from __future__ import annotations

import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from longctx.data.sources import formats
from longctx.data.sources.columns import arrow_rows, parquet_rows, saved_dataset
from longctx.data.sources.document import Document, Kind, LeftOut, Source
from longctx.data.sources.folder import EMPTY, walk
from longctx.data.sources.huggingface import HuggingFace
from longctx.data.sources.jsontext import json_lines, json_values
from longctx.data.sources.pieces import pieces
from longctx.data.sources.streams import Stream, opened
from longctx.data.sources.tables import csv_rows
from longctx.data.sources.tokenfiles import NANOGPT, Ids, TokenFiles, require_ids, token_format
from longctx.errors import DataError

STDLIB = "python-stdlib"
AUTO, PLAIN, CONVERSATIONS, IDS = "auto", "text", "chat", "tokens"
FORMATS = (AUTO, PLAIN, CONVERSATIONS, IDS)
"""of ``open_source``: content is recognised; files are read verbatim; only conversations; only token files"""


class Files:
    """Files in any format that formats.py recognises.

    Args:
        name: as the user gave it.
        files: what to read, in order.
        root: names in messages and documents are relative to it.
        field: key or column of the text; None: only conversations are read.
        plain: read every file verbatim as one document, including any markup.
        in_folder: leave out files without text by nature, instead of raising.
        left_out: files already left out when the folder was listed.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        root: Path,
        field: str | None = "text",
        *,
        plain: bool = False,
        in_folder: bool = False,
        left_out: dict[str, LeftOut] | None = None,
    ) -> None:
        self.name, self.files, self.root, self.field = name, list(files), root, field
        self.plain, self.in_folder, self._left_out = plain, in_folder, left_out or {}
        self.skipped: dict[str, LeftOut] = dict(self._left_out)
        self.formats: Counter[str] = Counter()

    def stamp(self) -> list[list[str | int]]:
        return [[os.path.abspath(file), (status := file.stat()).st_size, status.st_mtime_ns] for file in self.files]

    def documents(self) -> Iterator[Document]:
        self.skipped, self.formats = dict(self._left_out), Counter()
        for file in self.files:
            name = file.relative_to(self.root).as_posix()
            with opened(file) as stream:
                why = self._no_text(stream)
                if why is None:
                    yield from self._read(stream, name)
                    continue
            if not self.in_folder:
                what = "is empty (or only blanks)" if why == EMPTY else f"holds no text: it is a file of kind {why}"
                raise DataError(f"{file} {what}; give text")
            self.skipped[name] = LeftOut(why, 1, file.stat().st_size)

    def _no_text(self, stream: Stream) -> str | None:
        return EMPTY if stream.blank() else formats.left_out(stream.head)

    def _read(self, stream: Stream, name: str) -> Iterator[Document]:
        formats.refuse_unreadable(stream.head, stream.file, stream.suffix)
        kind, delimiter = formats.TEXT, ""
        if not self.plain or formats.columnar(stream.head):
            kind, delimiter = formats.recognise(stream.head, stream.whole, stream.file, stream.suffix, self.field)
        self.formats[kind] += 1
        if kind == formats.TEXT:
            yield Document(name, pieces(stream.text()))
            return
        found: Iterator[tuple[str, Kind, Iterable[str]]]
        if kind == formats.JSON_LINES:
            found = json_lines(stream, self.field)
        elif kind == formats.JSON:
            found = json_values(stream, self.field)
        elif kind == formats.TABLE:
            rows = csv_rows(stream, self.field, delimiter)
            found = ((place, what, [text]) for place, what, text in rows)
        else:
            columns = parquet_rows if kind == formats.PARQUET else arrow_rows
            found = ((place, what, [text]) for place, what, text in columns(stream.file, self.field))
        for place, what, text in found:
            yield Document(f"{name}:{place}", pieces(text), what)


class PythonFiles(Files):
    """The standard library: its few files in other encodings (they test Python itself) are left out and listed."""

    def _no_text(self, stream: Stream) -> str | None:
        why = super()._no_text(stream)
        if why is None:
            try:
                for _ in stream.text():
                    pass
            except DataError:
                return "not UTF-8"
            stream.rewind()
        return why


def open_source(
    given: str | Path,
    field: str | None = "text",
    *,
    format: str = AUTO,
    exclude: Sequence[str] = (),
    ids: Ids | None = None,
    streaming: bool = False,
) -> Source:
    """Return the source that ``given`` names.

    Args:
        given: a file, a folder, "python-stdlib", or "hf:NAME", "hf:NAME:SPLIT", "hf:NAME:CONFIG:SPLIT".
        field: key or column of the text in JSON, tables and datasets.
        format: "auto", "text" (every file is one document, verbatim, including any markup), "chat" (records are read
            as conversations, even if they have a text under ``field``), or "tokens" (files are token files of nanoGPT,
            Megatron or datatrove).
        exclude: patterns of files to leave out of folders (folder.py).
        ids: of the tokenizer of token files; None: there is none yet.
        streaming: read "hf:" rows as they arrive, without the copy that ``datasets`` keeps in its cache.

    Raises:
        DataError: no such file or folder, or a folder that cannot be read.
    """
    if format not in FORMATS:
        raise DataError(f"format {format!r}: choose one of {', '.join(FORMATS)}")
    plain, field = format == PLAIN, None if format == CONVERSATIONS else field
    if str(given) == STDLIB:
        return standard_library()
    if str(given).startswith("hf:"):
        name, *rest = str(given)[3:].split(":")
        if not name or len(rest) > 2:
            raise DataError(f"{given}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
        subset, split = rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"
        return HuggingFace(name, subset, split, field, streaming=streaming)
    path = Path(given).expanduser()
    kind = token_format(path) if format == AUTO and not path.is_dir() else None
    if format == IDS or (kind is not None and (kind != NANOGPT or ids is not None)):
        return _tokens(str(given), path, exclude, require_ids(ids, path), certain=format == IDS)
    if path.is_dir():
        saved = saved_dataset(path)
        if saved is not None:
            return Files(str(given), saved, path, field)
        left_out: dict[str, LeftOut] = {}
        files = walk(path, exclude, left_out)
        if not files:
            raise DataError(f"{path}: the folder holds no files{_why(left_out)}; give a folder with text")
        return Files(str(given), files, path, field, plain=plain, in_folder=True, left_out=left_out)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; give text files, JSONL files, folders, {STDLIB!r} or 'hf:NAME' (a dataset)"
        )
    return Files(str(given), [path], path.parent, field, plain=plain)


def _tokens(name: str, path: Path, exclude: Sequence[str], ids: Ids, certain: bool) -> Source:
    left_out: dict[str, LeftOut] = {}
    root, files = (path, walk(path, exclude, left_out)) if path.is_dir() else (path.parent, [path])
    return TokenFiles(name, files, root, ids, certain=certain, skipped=left_out)


def standard_library() -> Source:
    """Return the ``.py`` files of this Python's standard library: some tens of megabytes that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    leave_out = ("site-packages", "dist-packages", "__pycache__")
    files = [
        file
        for file in walk(root, leave_out)
        if file.suffix == ".py" and not file.name.startswith("_sysconfigdata")  # how this Python was compiled, not text
    ]
    if not files:
        raise DataError(f"{root}: this Python has no readable standard library; give text files instead of {STDLIB!r}")
    return PythonFiles(STDLIB, files, root, plain=True, in_folder=True)


def summarise(skipped: Iterable[tuple[str, LeftOut]]) -> list[dict[str, object]]:
    """Return what was left out, by reason: why, files, bytes, and the first ten paths."""
    reasons: dict[str, list[tuple[str, LeftOut]]] = {}
    for path, left in skipped:
        reasons.setdefault(left.why, []).append((path, left))
    return [
        {
            "why": why,
            "files": sum(left.files for _, left in entries),
            "bytes": sum(left.bytes for _, left in entries),
            "first": [path for path, _ in entries[:10]],
        }
        for why, entries in sorted(reasons.items())
    ]


def _why(left_out: dict[str, LeftOut]) -> str:
    reasons = [f"{entry['files']} {entry['why']}" for entry in summarise(left_out.items())]
    return f" but what is left out ({', '.join(reasons)})" if reasons else ""
