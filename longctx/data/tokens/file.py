"""Memory-mapped token files, which the loader reads without a copy.

``TokenStore`` is the common interface (tokens, document offsets, vocabulary, tokenizer); ``TokenFile`` is our own
format (format.py), and sources/readers.py maps those of other projects. Opening takes constant time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from longctx.data.tokens.format import HEADER_BYTES, Header, parse
from longctx.errors import DataError

_BLOCK = 2**22
_NONE = np.zeros(0, np.int64)


class TokenStore:
    """A sequence of tokens, divided into documents.

    Attributes:
        path: the file, for messages.
        tokens: (N,) uint16, uint32 or another integer type, mapped read-only.
        offsets: (documents + 1,) int64; document i is ``tokens[offsets[i]:offsets[i + 1]]``.
        vocabulary_size: every token is below it.
        tokenizer_hash: hex, or None where the format does not say.
        end_of_document: id of the token that ends each document, or None.
        identity: short text that changes with the content; saved in checkpoints.
        metadata: JSON object from the writer.
        ignored: (2 · runs,) int64, rising: tokens ``ignored[0]`` to ``ignored[1] - 1``, … are never labels.
    """

    def __init__(
        self,
        path: Path,
        stream: BinaryIO,
        tokens: npt.NDArray[Any],
        offsets: npt.NDArray[np.int64],
        vocabulary_size: int,
        identity: str,
        *,
        tokenizer_hash: str | None = None,
        end_of_document: int | None = None,
        metadata: dict[str, Any] | None = None,
        ignored: npt.NDArray[np.int64] = _NONE,
    ) -> None:
        self.path, self.tokens, self.offsets = path, tokens, offsets
        self.vocabulary_size, self.identity = vocabulary_size, identity
        self.tokenizer_hash, self.end_of_document = tokenizer_hash, end_of_document
        self.metadata, self.ignored = metadata or {}, ignored
        self._stream = stream
        self._stamp = _stamp(stream)

    @property
    def token_count(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def document_count(self) -> int:
        return int(self.offsets.shape[0]) - 1

    def document(self, index: int) -> npt.NDArray[Any]:
        """Return the tokens of a document, mapped. Raises: IndexError."""
        if not 0 <= index < self.document_count:
            raise IndexError(f"{self.path}: document {index} of {self.document_count}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def name(self, index: int) -> str:
        """Return the name of a document's source."""
        return f"document {index}"

    def is_ignored(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return for each token index whether that token is never a label (same shape, bool)."""
        return np.searchsorted(self.ignored, places, side="right") % 2 == 1

    @property
    def ignored_tokens(self) -> int:
        """Number of tokens that are never labels."""
        return int((self.ignored[1::2] - self.ignored[::2]).sum())

    def check_unchanged(self) -> None:
        """Raise DataError if the file was truncated or written to since it was opened.

        A new file renamed over the old one is harmless: the mapping keeps the old one alive.
        """
        if _stamp(self._stream) != self._stamp:
            raise DataError(
                f"{self.path} was written to while in use (size or modification time changed since it was opened): "
                "write new data to a new file and rename it; restart the run"
            )

    def require_tokenizer(self, tokenizer_hash: str) -> None:
        """Raise DataError unless the file was written with this tokenizer."""
        if self.tokenizer_hash is not None and self.tokenizer_hash != tokenizer_hash:
            raise DataError(
                f"{self.path}: offset 64: written with tokenizer {self.tokenizer_hash[:12]}, but the run uses "
                f"{tokenizer_hash[:12]}: take the tokenizer folder beside the file, or build the file again with yours"
            )

    def require_vocabulary(self, vocabulary_size: int) -> None:
        """Raise DataError if the file may hold tokens outside a model's vocabulary of this size."""
        if self.vocabulary_size > vocabulary_size:
            raise DataError(
                f"{self.path}: its tokens go up to {self.vocabulary_size - 1}, but the model's vocabulary is "
                f"{vocabulary_size}: make the model's vocabulary at least {self.vocabulary_size}, or use its tokenizer"
            )

    def check_tokens(self) -> None:
        """Read everything: offsets must rise from 0 to N, tokens must be below the vocabulary.

        Raises:
            DataError: with the file, the document and the offset in tokens.
        """
        check_offsets(self.offsets, self.token_count, self.path)
        if bool((np.diff(self.ignored, prepend=-1, append=self.token_count + 1) <= 0).any()):
            raise DataError(f"{self.path}: the borders of ignored tokens are damaged; build it again")
        begin = 0
        for block in self._blocks():
            if int(block.max()) >= self.vocabulary_size or int(block.min()) < 0:
                bad = begin + int(np.argmax((block >= self.vocabulary_size) | (block < 0)))
                raise bad_token(self, bad)
            begin += block.size

    def _blocks(self) -> Iterator[npt.NDArray[Any]]:
        """Yield all tokens, in blocks."""
        for begin in range(0, self.token_count, _BLOCK):
            yield self.tokens[begin : begin + _BLOCK]

    def close(self) -> None:
        """Release the file; the mapped arrays stay valid while they are referenced."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        counts = f"{self.token_count} tokens in {self.document_count} documents"
        return f"{type(self).__name__}({str(self.path)!r}: {counts})"


class TokenFile(TokenStore):
    """A token file of our own format, opened in constant time and memory.

    Args:
        path: the file.
        tokenizer_hash: refuse a file written with another tokenizer.
        vocabulary_size: refuse a file that may hold tokens at or above it.

    Raises:
        DataError: missing, not a token file, damaged header, truncated, wrong tokenizer or vocabulary.
    """

    header: Header

    def __init__(
        self, path: str | Path, *, tokenizer_hash: str | None = None, vocabulary_size: int | None = None
    ) -> None:
        path = Path(path)
        stream = open_regular(path)
        try:
            size = os.fstat(stream.fileno()).st_size
            header = self.header = parse(stream.read(HEADER_BYTES), size, path)
            raw = np.asarray(np.memmap(stream, dtype=np.uint8, mode="r"))
            metadata = self._metadata(raw[header.metadata_at :][: header.metadata_bytes], path)
            tokens = raw[HEADER_BYTES : HEADER_BYTES + header.token_count * header.token_bytes]
            offsets = raw[header.offsets_at : header.name_offsets_at].view("<i8")
            if offsets[0] != 0 or offsets[-1] != header.token_count:
                raise DataError(
                    f"{path}: offset {header.offsets_at}: the document index is damaged; "
                    "build it again with `longctx data build`"
                )
            super().__init__(
                path,
                stream,
                tokens.view(f"<u{header.token_bytes}"),
                offsets,
                header.vocabulary_size,
                header.payload_hash.hex(),
                tokenizer_hash=header.tokenizer_hash.hex(),
                end_of_document=None if header.end_of_document < 0 else header.end_of_document,
                metadata=metadata,
                ignored=raw[header.ignored_at :].view("<i8") if header.ignored_count else _NONE,
            )
            self._raw = raw
            if tokenizer_hash is not None:
                self.require_tokenizer(tokenizer_hash)
            if vocabulary_size is not None:
                self.require_vocabulary(vocabulary_size)
        except BaseException:
            stream.close()
            raise

    @staticmethod
    def _metadata(raw: npt.NDArray[np.uint8], path: Path) -> dict[str, Any]:
        try:
            metadata = json.loads(raw.tobytes() or b"{}")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: its metadata is damaged ({error}); run `longctx data build` again") from None
        return metadata if isinstance(metadata, dict) else {}

    def name(self, index: int) -> str:
        header = self.header
        ends = self._raw[header.name_offsets_at : header.names_at].view("<i8")[index : index + 2].tolist()
        if not 0 <= ends[0] <= ends[1] <= header.names_bytes:
            return super().name(index)
        return self._raw[header.names_at + ends[0] : header.names_at + ends[1]].tobytes().decode(errors="replace")

    def verify(self) -> None:
        """Read the whole file: checksum, document index and token range.

        Raises:
            DataError: the content is not what was written.
        """
        digest = hashlib.sha256()
        for data in self._read(self._raw.shape[0]):
            digest.update(data)
        if digest.digest() != self.header.payload_hash:
            raise DataError(
                f"{self.path}: offset {HEADER_BYTES}: the checksum of its content is wrong, the file is damaged; "
                "copy it again or build it again with `longctx data build`"
            )
        self.check_tokens()

    def _blocks(self) -> Iterator[npt.NDArray[Any]]:
        for data in self._read(HEADER_BYTES + self.token_count * self.header.token_bytes):
            yield np.frombuffer(data, self.tokens.dtype)

    def _read(self, end: int) -> Iterator[bytes]:
        """Read the file from after the header up to ``end``; mapped pages would count as this process's memory."""
        for begin in range(HEADER_BYTES, end, _BLOCK):
            wanted = min(_BLOCK, end - begin)
            data = os.pread(self._stream.fileno(), wanted, begin)
            if len(data) < wanted:
                raise DataError(f"{self.path}: offset {begin + len(data)}: cannot be read to its end; copy it again")
            yield data


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises: DataError."""
    if not path.exists():
        raise DataError(f"{path} does not exist; give the path of a token file, or make one with `longctx data build`")
    if not path.is_file():
        raise DataError(f"{path} is not a regular file; give the path of a token file")
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}") from None


def check_offsets(offsets: npt.NDArray[np.int64], token_count: int, path: Path) -> None:
    """Raise DataError unless document offsets rise strictly from 0 to ``token_count``."""
    steps = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != token_count or bool((steps <= 0).any()):
        document = int(np.argmax(steps <= 0))
        raise DataError(
            f"{path}: document {document}: the document index is damaged (offsets {int(offsets[document])} to "
            f"{int(offsets[document + 1])} of {token_count} tokens); build it again with `longctx data build`"
        )


def bad_token(store: TokenStore, offset: int) -> DataError:
    """Return the error for a token outside the vocabulary at ``offset`` (in tokens)."""
    document = int(np.searchsorted(store.offsets, offset, side="right")) - 1
    return DataError(
        f"{store.path}: token {offset} ({store.name(document)}) is {int(store.tokens[offset])}, outside the vocabulary "
        f"of {store.vocabulary_size}: the file is damaged, or was made with another tokenizer or integer type"
    )


def _stamp(stream: BinaryIO) -> tuple[int, int]:
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns
