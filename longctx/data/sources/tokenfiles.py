"""Token files of nanoGPT, Megatron and datatrove as a source: their documents are copied without a tokenizer.

Megatron and datatrove files have an index beside them that they must agree with. nanoGPT's are nothing but tokens, so
without ``data.format: tokens`` the token that ends a document must occur in them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from longctx.data.sources import formats
from longctx.data.sources.document import TOKENS, Document, LeftOut
from longctx.data.sources.readers import read_datatrove, read_megatron, read_nanogpt
from longctx.data.tokens.file import TokenStore
from longctx.errors import DataError

MEGATRON, DATATROVE, NANOGPT = "Megatron", "datatrove", "nanoGPT"
_MAGIC = b"MMIDIDX"
_INDEXES = (".idx", ".index")
_BLOCK = 2**18
_SAMPLE_BYTES = 2**20


class Ids(NamedTuple):
    """What a run's tokenizer says of ids: every id is below ``vocabulary_size``."""

    vocabulary_size: int
    end_of_document: int | None


def token_format(path: Path) -> str | None:
    """Return the format of a token file (of Megatron's also NAME or NAME.idx), or None if it may be another file."""
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    index = stem.with_name(stem.name + ".idx")
    if index.is_file() and _head(index, len(_MAGIC)) == _MAGIC:
        return MEGATRON
    ends = path.with_name(path.name + ".index")
    if not path.is_file():
        return None
    if ends.is_file() and _agrees(path, ends):
        return DATATROVE
    return NANOGPT if path.suffix == ".bin" and _may_be_raw(path) else None


def _may_be_raw(path: Path) -> bool:
    """Return whether a file may be nothing but tokens: neither text nor another format that its first bytes name."""
    head = _head(path, formats.HEAD_BYTES)
    return path.stat().st_size % 2 == 0 and not formats.is_text(head) and not formats.has_mark(head)


class TokenFiles:
    """Token files of other projects, in order.

    Args:
        name: as the user gave it.
        files: of any of the formats; indexes among them are read with their tokens.
        root: names of documents are relative to it.
        ids: of the tokenizer that made the tokens.
        certain: the user says that these are token files.
        skipped: files left out when the folder was listed.
    """

    def __init__(
        self, name: str, files: Sequence[Path], root: Path, ids: Ids, *, certain: bool, skipped: dict[str, LeftOut]
    ) -> None:
        self.name, self.root, self.ids, self.certain = name, root, ids, certain
        indexes = {file for file in files if file.suffix in _INDEXES and _tokens_of(file) in files}
        self.files = [file for file in files if file not in indexes]
        self.skipped, self.formats = skipped, Counter[str]()

    def stamp(self) -> list[list[str | int]]:
        found = [path for file in self.files for path in (file, *_beside(file)) if path.is_file()]
        return [[os.path.abspath(path), (status := path.stat()).st_size, status.st_mtime_ns] for path in found]

    def documents(self) -> Iterator[Document]:
        self.formats = Counter()
        for file in self.files:
            with self._open(file) as store:
                name = file.relative_to(self.root).as_posix()
                for number in range(store.document_count):
                    yield Document(f"{name}:{number}", _blocks(store.document(number)), TOKENS)

    def _open(self, file: Path) -> TokenStore:
        kind, (size, end) = token_format(file), self.ids
        if kind is None:
            raise DataError(
                f"{file}: no token file of Megatron (NAME.bin with NAME.idx), datatrove (NAME.ds with NAME.ds.index) "
                "or nanoGPT (NAME.bin); name it in data.exclude, or remove data.format: tokens"
            )
        self.formats[f"{kind} tokens"] += 1
        if kind == MEGATRON:
            return read_megatron(file, size, end_of_document=end)
        if kind == DATATROVE:
            return read_datatrove(file, size, end_of_document=end)
        store = read_nanogpt(file, size, end_of_document=end, dtype=_type(file, size))
        if not self.certain and (end is None or not bool((store.tokens == end).any())):
            store.close()
            raise DataError(
                f"{file}: may be a nanoGPT file of {store.token_count:,} tokens, but data.tokenizer's token {end} that "
                "ends a document is not in it; give the tokenizer that made it, or set data.format: tokens"
            )
        return store


def require_ids(ids: Ids | None, path: Path) -> Ids:
    """Return ``ids``. Raises: DataError: there is no tokenizer yet, so ``path`` cannot be read."""
    if ids is None:
        raise DataError(f"{path} holds tokens; give the tokenizer that made them as data.tokenizer, instead of bpe")
    return ids


def _blocks(tokens: npt.NDArray[np.generic]) -> Iterator[npt.NDArray[np.uint32]]:
    return (tokens[begin : begin + _BLOCK].astype(np.uint32) for begin in range(0, tokens.size, _BLOCK))


def _type(file: Path, vocabulary_size: int) -> str:
    """Return "uint32" if the first tokens read so are in the vocabulary, which pairs of 16-bit tokens are not."""
    head = _head(file, _SAMPLE_BYTES)
    wide = file.stat().st_size % 4 == 0 and int(np.frombuffer(head, "<u4").max(initial=0)) < vocabulary_size
    return "uint32" if wide else "uint16"


def _agrees(path: Path, ends: Path) -> bool:
    """Return whether datatrove's index states the number of tokens that a file holds."""
    size = ends.stat().st_size
    if size < 8 or size % 8:
        return False
    with open(ends, "rb") as stream:
        stream.seek(-8, os.SEEK_END)
        tokens = int.from_bytes(stream.read(8), "little")
    return path.stat().st_size in (2 * tokens, 4 * tokens)


def _tokens_of(index: Path) -> Path:
    """Return the file of tokens to which an index belongs."""
    return index.with_suffix(".bin" if index.suffix == ".idx" else "")


def _beside(file: Path) -> list[Path]:
    stem = file.with_suffix("") if file.suffix in (".bin", ".idx") else file
    others = (file.name + ".index", stem.name + ".idx", stem.name + ".bin")
    return [file.with_name(name) for name in others if name != file.name]


def _head(path: Path, size: int) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(size)
