"""Packed rows of one or more token files, readable at any subset of positions, so that a rank reads only its shard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from longctx.data.pack import Packing, Pieces, pack
from longctx.data.tokens.file import TokenFile, TokenStore, bad_token
from longctx.errors import DataError

IGNORED = -100  # label of a position without a target
PAD_DOCUMENT = -1

Files = str | Path | TokenStore | Sequence[str | Path | TokenStore]


class Part(NamedTuple):
    """T positions of a row; each array is (T,)."""

    input_ids: npt.NDArray[np.int64]  # 0 at pads
    position_ids: npt.NDArray[np.int64]  # from 0 in every document of the row; 0 at pads
    document_ids: npt.NDArray[np.int32]  # 0, 1, … in the row; -1 at pads
    labels: npt.NDArray[np.int64]  # the next token of its document; -100 if there is none or the loss ignores it


class PackedRows:
    """The rows of a data set, numbered through all its files.

    Args:
        files: a token file or several (paths or opened stores).
        sequence_length: tokens in a row.
        packing: "concat" or "best_fit".
        long_documents: what "best_fit" does with documents longer than a row (``pack``).
        by_source: pack the documents of each source by themselves (``sources``); a row then is of one source.
        tokenizer_hash, vocabulary_size: reject files that do not match.

    Raises:
        DataError: no file, one that is damaged or does not match, or (``by_source``) that does not name its sources.

    Attributes:
        sources: (name, number of rows) of each source, in the order of rows; empty unless ``by_source``.
    """

    def __init__(
        self,
        files: Files,
        sequence_length: int,
        packing: str = "best_fit",
        *,
        long_documents: str = "split",
        by_source: bool = False,
        tokenizer_hash: str | None = None,
        vocabulary_size: int | None = None,
    ) -> None:
        given = [files] if isinstance(files, (str, Path, TokenStore)) else list(files)
        if not given:
            raise DataError("no token file was given; make one with `longctx data build`")
        self.stores = [file if isinstance(file, TokenStore) else TokenFile(file) for file in given]
        self.sequence_length, self.packing, self.long_documents = sequence_length, packing, long_documents
        for store in self.stores:
            if tokenizer_hash is not None:
                store.require_tokenizer(tokenizer_hash)
            if vocabulary_size is not None:
                store.require_vocabulary(vocabulary_size)
        self._parts: list[tuple[TokenStore, int]] = []  # a file, and the first of its documents that are packed here
        self._packings: list[Packing] = []
        self.sources: list[tuple[str, int]] = []
        for store in self.stores:
            for name, first, end in _documents_of(store) if by_source else [("", 0, store.document_count)]:
                offsets = store.offsets[first : end + 1]
                self._parts.append((store, first))
                self._packings.append(
                    pack(offsets - offsets[0] if first else offsets, sequence_length, packing, long_documents)
                )
                self.sources += [(name, self._packings[-1].rows)] if by_source else []
        self._first_rows = np.cumsum([0] + [packed.rows for packed in self._packings])

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    @property
    def token_count(self) -> int:
        """Tokens in all rows."""
        return sum(packed.tokens for packed in self._packings)

    @property
    def fill(self) -> float:
        """The share of positions that hold a token and not padding."""
        return self.token_count / (len(self) * self.sequence_length)

    @property
    def identity(self) -> str:
        """Text that changes with the content, the packing and the length; a resumed run must find the same."""
        files = "+".join(store.identity[:32] for store in self.stores)
        long = "" if self.long_documents == "split" else f":{self.long_documents}"
        return f"{files}:{self.packing}:{self.sequence_length}{long}"

    def pieces(self, row: int) -> tuple[TokenStore, Pieces]:
        """Return the file of a row and the row's pieces. Raises: IndexError."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        part = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        store, first = self._parts[part]
        starts, lengths, documents = self._packings[part].pieces(row - int(self._first_rows[part]))
        return store, Pieces(starts + store.offsets[first], lengths, documents + first)

    def check_unchanged(self) -> None:
        """Raise DataError if a file was written to since it was opened."""
        for store in self.stores:
            store.check_unchanged()

    def read(self, row: int, positions: npt.NDArray[np.int64]) -> Part:
        """Read a row at T positions; of the file, only these tokens and their labels are read.

        Args:
            positions: (T,) int64, at or above 0 in any order; those beyond the row's tokens are pads.

        Raises:
            DataError: a token is outside the file's vocabulary.
        """
        store, (starts, lengths, documents) = self.pieces(row)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        part = empty_part(positions.size)
        kept = positions < bounds[-1]
        where = positions[kept]
        piece = np.searchsorted(bounds, where, side="right") - 1
        inside = where - bounds[piece]
        source = starts[piece] + inside
        last = store.offsets[documents + 1][piece] - 1  # the document's last token, in this row or in a later one
        ids = store.tokens[source].astype(np.int64)
        targets = store.tokens[np.minimum(source + 1, last)].astype(np.int64)
        for values, at in ((ids, source), (targets, source + 1)):
            if values.size and (int(values.max()) >= store.vocabulary_size or int(values.min()) < 0):
                raise bad_token(store, int(at[np.argmax((values >= store.vocabulary_size) | (values < 0))]))
        part.input_ids[kept], part.position_ids[kept], part.document_ids[kept] = ids, inside, piece
        has_label = source < last
        if store.ignored.size:
            has_label &= ~store.is_ignored(source + 1)
        part.labels[kept] = np.where(has_label, targets, IGNORED)
        return part


def _documents_of(store: TokenStore) -> list[tuple[str, int, int]]:
    """Return (name, first document, last document + 1) of each source of a file."""
    sources = store.metadata.get("by_source")
    if not isinstance(sources, list):
        raise DataError(f"{store.path} does not say which source its documents are of; build it again to weigh sources")
    ends = np.cumsum([0, *(documents for _, documents in sources)]).tolist()
    return [(name, ends[index], ends[index + 1]) for index, (name, _) in enumerate(sources)]


def empty_part(count: int) -> Part:
    """Return ``count`` pads."""
    return Part(
        np.zeros(count, np.int64),
        np.zeros(count, np.int64),
        np.full(count, PAD_DOCUMENT, np.int32),
        np.full(count, IGNORED, np.int64),
    )
