"""Write a token file under a temporary name and publish it by one rename, so that readers never see a partial file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from longctx.data.tokens.file import check_offsets
from longctx.data.tokens.format import HEADER_BYTES, MAX_METADATA_BYTES, MAX_VOCABULARY, Header
from longctx.errors import DataError

_BLOCK = 2**22


class TokenWriter:
    """Appends documents to a new token file; use as a context manager.

    Leaving the block normally publishes the file (fsync, rename, fsync of the folder); leaving it by an exception
    removes what was written. Memory: eight bytes per document plus its name, 16 bytes per run of ignored tokens.

    Args:
        path: final name; replaced atomically if it exists.
        vocabulary_size: tokens must be below it; up to 65,536 they are stored as uint16, else as uint32.
        tokenizer_hash: 64 hex digits.
        end_of_document: id appended to every document that does not end with it, or None.
        metadata: JSON object kept in the file.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vocabulary_size: int,
        tokenizer_hash: str,
        end_of_document: int | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        if not 0 < vocabulary_size <= MAX_VOCABULARY:
            raise DataError(f"vocabulary_size {vocabulary_size}: choose 1 to {MAX_VOCABULARY}")
        if end_of_document is not None and not 0 <= end_of_document < vocabulary_size:
            raise DataError(f"end_of_document {end_of_document} is outside the vocabulary of {vocabulary_size}")
        self.path = Path(path)
        self.vocabulary_size, self.end_of_document = vocabulary_size, end_of_document
        self.metadata = dict(metadata or {})
        self.token_count, self._last = 0, -1
        self._tokenizer_hash = bytes.fromhex(tokenizer_hash)
        self._dtype = np.dtype("<u2" if vocabulary_size <= 2**16 else "<u4")
        self._offsets, self._name_offsets, self._names = array("Q", [0]), array("Q", [0]), bytearray()
        self._ignored = array("Q")
        self._digest = hashlib.sha256()

    @property
    def document_count(self) -> int:
        return len(self._offsets) - 1

    @property
    def ignored_tokens(self) -> int:
        """Number of tokens that are never labels."""
        borders = np.asarray(self._ignored, np.int64)
        return int((borders[1::2] - borders[::2]).sum())

    def __enter__(self) -> TokenWriter:
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._aside, self._stream = open_aside(self.path)
        with self._removing_on_error():
            self._stream.write(bytes(HEADER_BYTES))
        return self

    def add(self, tokens: npt.ArrayLike, name: str = "") -> None:
        """Append one document (1-D integers, at least one) and ``end_of_document``. Raises: DataError."""
        if np.size(tokens) == 0:
            raise DataError(f"{self._where(name)}: a document is a non-empty row of integers")
        self.append(tokens, name)
        self.end_document(name)

    def append(self, tokens: npt.ArrayLike, name: str = "", labels: npt.NDArray[np.bool_] | None = None) -> None:
        """Append tokens to the current document, which ``end_document`` ends.

        Args:
            tokens: 1-D integers.
            labels: for each token whether the loss counts its prediction; None: all.

        Raises:
            DataError: not such tokens, or one outside the vocabulary.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(f"{self._where(name)}: tokens are a row of integers, not {ids.dtype} of shape {ids.shape}")
        if ids.size and (int(ids.max()) >= self.vocabulary_size or int(ids.min()) < 0):
            bad = int(np.argmax((ids >= self.vocabulary_size) | (ids < 0)))
            raise DataError(
                f"{self._where(name)}: token {self._open_tokens + bad} is {int(ids[bad])}, outside the vocabulary of "
                f"{self.vocabulary_size}: state the vocabulary size of the tokenizer that made it"
            )
        self._write(ids.astype(self._dtype).tobytes())
        if labels is not None:
            self._ignore(labels)
        self.token_count += ids.size
        self._last = int(ids[-1]) if ids.size else self._last

    def _ignore(self, labels: npt.NDArray[np.bool_]) -> None:
        """Note the runs of tokens without a label among those that are about to be counted."""
        edges = np.flatnonzero(np.diff(~labels, prepend=False, append=False)) + self.token_count
        if edges.size and self._ignored and self._ignored[-1] == edges[0]:  # the run continues
            self._ignored.pop()
            edges = edges[1:]
        self._ignored.frombytes(edges.astype(np.uint64).tobytes())

    def end_document(self, name: str = "", *, complete: bool = False) -> bool:
        """End the document whose tokens were appended; return False, and do nothing, if there were none.

        Args:
            complete: the tokens are the whole document: ``end_of_document`` is not appended.
        """
        if not self._open_tokens:
            return False
        if not complete and self.end_of_document is not None and self._last != self.end_of_document:
            self.append([self.end_of_document], name)
        self._offsets.append(self.token_count)
        self._names += name.encode(errors="replace")
        self._name_offsets.append(len(self._names))
        return True

    @property
    def _open_tokens(self) -> int:
        return self.token_count - self._offsets[-1]

    def _where(self, name: str) -> str:
        return name or f"document {self.document_count}"

    def extend(self, tokens: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> None:
        """Append many documents unchanged: no end-of-document token is added, names are empty.

        Args:
            tokens: (N,) integers.
            offsets: (documents + 1,) int64, rising strictly from 0 to N.
        """
        check_offsets(offsets, tokens.size, self.path)
        for begin in range(0, tokens.size, _BLOCK):
            block = tokens[begin : begin + _BLOCK]
            if int(block.max()) >= self.vocabulary_size or int(block.min()) < 0:
                raise DataError(
                    f"{self.path}: tokens outside the vocabulary of {self.vocabulary_size} were to be added"
                )
            self._write(block.astype(self._dtype).tobytes())
        self._offsets.frombytes((offsets[1:] + self.token_count).astype(np.uint64).tobytes())
        self._name_offsets.frombytes(np.full(offsets.size - 1, len(self._names), np.uint64).tobytes())
        self.token_count += tokens.size

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._discard()
            return
        with self._removing_on_error():
            self._publish()

    def _publish(self) -> None:
        if self.document_count == 0:
            raise DataError(f"{self.path}: no document was added, there is nothing to train on; give text")
        self.metadata.setdefault("format", "longctx tokens")
        metadata = json.dumps(self.metadata, sort_keys=True).encode()
        if len(metadata) > MAX_METADATA_BYTES:
            raise DataError(f"{self.path}: metadata of {len(metadata)} bytes; at most {MAX_METADATA_BYTES}")
        header = Header(
            token_bytes=self._dtype.itemsize,
            vocabulary_size=self.vocabulary_size,
            token_count=self.token_count,
            document_count=self.document_count,
            end_of_document=-1 if self.end_of_document is None else self.end_of_document,
            names_bytes=len(self._names),
            metadata_bytes=len(metadata),
            tokenizer_hash=self._tokenizer_hash,
            payload_hash=b"",
            ignored_count=len(self._ignored),
        )
        for place, section in (
            (header.offsets_at, _little_endian(self._offsets)),
            (header.name_offsets_at, _little_endian(self._name_offsets)),
            (header.names_at, bytes(self._names)),
            (header.metadata_at, metadata),
            (header.ignored_at, _little_endian(self._ignored)),
        ):
            self._write(bytes(place - self._stream.tell()) + section)
        header = Header(**{**header.__dict__, "payload_hash": self._digest.digest()})
        self._stream.seek(0)
        self._stream.write(header.pack())
        publish(self._stream, self._aside, self.path)

    def _write(self, data: bytes) -> None:
        with self._removing_on_error():
            self._stream.write(data)
        self._digest.update(data)

    @contextmanager
    def _removing_on_error(self) -> Iterator[None]:
        try:
            with disk_errors(self.path):
                yield
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        try:
            self._stream.close()
        except OSError:  # a full disk fails again when the buffer is flushed
            pass
        self._aside.unlink(missing_ok=True)


def open_aside(path: Path) -> tuple[Path, BinaryIO]:
    """Open a new file beside ``path`` that ``publish`` renames to it, with the permissions that the umask gives."""
    aside = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    return aside, os.fdopen(descriptor, "wb", buffering=2**20)


def publish(stream: BinaryIO, aside: Path, path: Path) -> None:
    """Make ``aside``, open as ``stream``, appear as ``path``: flush, fsync, rename, fsync of the folder."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
    os.replace(aside, path)
    sync_folder(path.parent)


def file_mode() -> int:
    """Return the permissions that an ordinary new file gets under this process's umask."""
    try:
        status = Path("/proc/self/status").read_text()
        mask = int(status.partition("Umask:")[2].split()[0], 8)
    except (OSError, IndexError, ValueError):  # not Linux: read it by setting it, which other threads might notice
        mask = os.umask(0o077)
        os.umask(mask)
    return 0o666 & ~mask


def publish_bytes(data: bytes, path: Path) -> None:
    """Write a small file atomically."""
    with disk_errors(path):
        aside, stream = open_aside(path)
        try:
            with stream:
                stream.write(data)
                publish(stream, aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable (fsync)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Convert OSErrors of writing ``path`` into DataErrors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{path}: the disk is full; nothing was kept of it: free some space or choose another output folder"
            ) from None
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}; choose an output folder that you may write to"
        ) from None


def _little_endian(values: array[int]) -> bytes:
    return np.asarray(values, dtype="<u8").tobytes()
