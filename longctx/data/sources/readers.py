"""Token files of other projects: nanoGPT ``.bin``, Megatron ``.bin``/``.idx``, datatrove ``.ds``; read and written.

A reader maps the file and returns a ``TokenStore`` that the loader takes as it is; ``import_tokens`` turns any store
into our own format, which carries checksums. What these formats do not record (vocabulary, tokenizer, and nanoGPT's
document ends) must be given, and every token is checked against it once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from longctx.data.tokens.file import TokenStore, open_regular
from longctx.data.tokens.writer import TokenWriter, disk_errors, open_aside, publish
from longctx.errors import DataError

_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_HEADER = len(_MEGATRON_MAGIC) + 8 + 1 + 8 + 8
_MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_BLOCK = 2**22


def read_nanogpt(
    path: str | Path, vocabulary_size: int, *, end_of_document: int | None = None, dtype: str = "uint16"
) -> TokenStore:
    """Map a nanoGPT ``.bin``: raw tokens and nothing else.

    Args:
        end_of_document: token after which a new document begins; None makes the whole file one document.
        dtype: "uint16" (what nanoGPT writes) or "uint32".

    Raises:
        DataError: not a whole number of tokens, or a token outside the vocabulary (a wrong dtype shows here).
    """
    if dtype not in ("uint16", "uint32"):
        raise DataError(f"dtype {dtype!r}: a nanoGPT file holds 'uint16' or 'uint32'")
    stream, tokens = _map(Path(path), np.dtype(dtype).newbyteorder("<"))
    if end_of_document is None:
        offsets = np.array([0, tokens.size], dtype=np.int64)
    else:
        ends = [begin + np.flatnonzero(tokens[begin : begin + _BLOCK] == end_of_document) + 1
                for begin in range(0, tokens.size, _BLOCK)]  # fmt: skip
        offsets = np.unique(np.concatenate([[0], *ends, [tokens.size]])).astype(np.int64)
    return _checked(Path(path), stream, tokens, offsets, vocabulary_size, end_of_document)


def read_megatron(path: str | Path, vocabulary_size: int, *, end_of_document: int | None = None) -> TokenStore:
    """Map a Megatron pair ``NAME.bin`` and ``NAME.idx``; the sequences of a document become one document.

    Args:
        path: either file, or NAME.

    Raises:
        DataError: damaged index, or one that does not belong to the ``.bin``.
    """
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    index, binary = stem.with_name(stem.name + ".idx"), stem.with_name(stem.name + ".bin")
    stream, raw = _map(index, np.dtype("u1"))
    stream.close()
    if raw[:9].tobytes() != _MEGATRON_MAGIC or raw.size < _MEGATRON_HEADER:
        raise DataError(f"{index}: offset 0: not a Megatron index")
    version = int(raw[9:17].view("<i8")[0])
    sequences, documents = raw[18:34].view("<i8").tolist()
    if version != 1 or int(raw[17]) not in _MEGATRON_TYPES:
        raise DataError(
            f"{index}: offset 9: version {version} with type {int(raw[17])}; version 1 and integers are read"
        )
    ends = np.cumsum([_MEGATRON_HEADER, 4 * sequences, 8 * sequences, 8 * documents], dtype=object).tolist()
    if sequences < 1 or documents < 2 or ends[-1] not in (raw.size, raw.size - sequences):  # one mode byte per sequence
        raise DataError(
            f"{index}: offset 18: {sequences} sequences in {documents - 1} documents need {ends[-1]} bytes, but the "
            f"file has {raw.size}; copy it again"
        )
    lengths = raw[ends[0] : ends[1]].view("<i4").astype(np.int64)
    pointers, borders = raw[ends[1] : ends[2]].view("<i8"), raw[ends[2] : ends[3]].view("<i8")
    stream, tokens = _map(binary, np.dtype(_MEGATRON_TYPES[int(raw[17])]))
    sequence_offsets = np.concatenate([[0], np.cumsum(lengths)])
    whole = int(sequence_offsets[-1]) == tokens.size and not bool((lengths < 0).any())
    if not whole or not np.array_equal(pointers, sequence_offsets[:-1] * tokens.itemsize):
        stream.close()
        raise DataError(
            f"{binary}: {tokens.size} tokens, its index states {int(sequence_offsets[-1])}; copy both again"
        )
    if borders[0] != 0 or borders[-1] != sequences or bool((np.diff(borders) < 0).any()):
        stream.close()
        raise DataError(f"{index}: offset {ends[2]}: document borders are damaged; copy it again")
    offsets = np.unique(sequence_offsets[borders])  # drop empty documents
    return _checked(binary, stream, tokens, offsets, vocabulary_size, end_of_document, raw)


def read_datatrove(path: str | Path, vocabulary_size: int, *, end_of_document: int | None = None) -> TokenStore:
    """Map a datatrove ``NAME.ds`` with its ``NAME.ds.index`` (document ends); two or four bytes per token.

    Raises:
        DataError: the index does not belong to the tokens.
    """
    path = Path(path)
    index = path.with_name(path.name + ".index")
    stream, ends = _map(index, np.dtype("<i8"))
    stream.close()
    stream, raw = _map(path, np.dtype("u1"))
    count = int(ends[-1])
    if count < 1 or raw.size not in (2 * count, 4 * count) or bool((np.diff(ends) < 0).any()) or ends[0] < 0:
        stream.close()
        raise DataError(f"{path}: {raw.size} bytes, but {index.name} states {count} tokens; copy both again")
    offsets = np.unique(np.concatenate([[0], ends]))
    return _checked(path, stream, raw.view(f"<u{raw.size // count}"), offsets, vocabulary_size, end_of_document, ends)


def import_tokens(store: TokenStore, path: str | Path, tokenizer_hash: str, **metadata: Any) -> None:
    """Copy a store into a token file of our own format.

    Args:
        tokenizer_hash: of the tokenizer that made the tokens (``load_tokenizer(...).hash``).
    """
    with TokenWriter(
        path, vocabulary_size=store.vocabulary_size, tokenizer_hash=tokenizer_hash, metadata=metadata
    ) as writer:
        writer.extend(store.tokens, store.offsets)


def write_nanogpt(store: TokenStore, path: str | Path) -> None:
    """Write raw tokens, uint16 if the vocabulary fits, else uint32; documents are not recorded."""
    _write(Path(path), _blocks(store.tokens, _token_type(store)))


def write_megatron(store: TokenStore, path: str | Path) -> None:
    """Write ``NAME.bin`` and ``NAME.idx``, one sequence per document; int32 from 65,500 tokens, as Megatron."""
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    code, kind = (8, "<u2") if store.vocabulary_size < 65500 else (4, "<i4")
    _write(stem.with_name(stem.name + ".bin"), _blocks(store.tokens, kind))
    lengths = np.diff(store.offsets)
    header = _MEGATRON_MAGIC + np.array([1], "<u8").tobytes() + bytes([code])
    counts = np.array([lengths.size, lengths.size + 1], "<u8").tobytes()
    pointers = (store.offsets[:-1] * np.dtype(kind).itemsize).astype("<i8").tobytes()
    borders = np.arange(lengths.size + 1, dtype="<i8").tobytes()
    _write(stem.with_name(stem.name + ".idx"), [header, counts, lengths.astype("<i4").tobytes(), pointers, borders])


def write_datatrove(store: TokenStore, path: str | Path) -> None:
    """Write ``NAME.ds`` and ``NAME.ds.index``."""
    path = Path(path)
    _write(path, _blocks(store.tokens, _token_type(store)))
    _write(path.with_name(path.name + ".index"), [store.offsets[1:].astype("<u8").tobytes()])


def _token_type(store: TokenStore) -> str:
    return "<u2" if store.vocabulary_size <= 2**16 else "<u4"


def _blocks(tokens: npt.NDArray[Any], kind: str) -> Iterable[bytes]:
    return (tokens[begin : begin + _BLOCK].astype(kind).tobytes() for begin in range(0, tokens.size, _BLOCK))


def _write(path: Path, blocks: Iterable[bytes]) -> None:
    with disk_errors(path):
        aside, stream = open_aside(path)
        try:
            with stream:
                stream.writelines(blocks)
                publish(stream, aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def _map(path: Path, dtype: np.dtype[Any]) -> tuple[BinaryIO, npt.NDArray[Any]]:
    stream = open_regular(path)
    size = os.fstat(stream.fileno()).st_size
    if size == 0 or size % dtype.itemsize:
        stream.close()
        what = "is empty" if size == 0 else f"is truncated: not a whole number of {dtype.itemsize}-byte values"
        raise DataError(f"{path}: offset {size}: the file {what}; copy it again")
    return stream, np.asarray(np.memmap(stream, dtype=dtype, mode="r"))


def _checked(
    path: Path,
    stream: BinaryIO,
    tokens: npt.NDArray[Any],
    offsets: npt.NDArray[np.int64],
    vocabulary_size: int,
    end_of_document: int | None,
    index: npt.NDArray[Any] | None = None,
) -> TokenStore:
    """Check every token and name the content by its size, its index and its first and last megabytes."""
    digest = hashlib.sha256(f"{tokens.size} {tokens.dtype}".encode())
    for part in (tokens[: 2**18], tokens[-(2**18) :], offsets if index is None else index):
        digest.update(np.ascontiguousarray(part).tobytes())
    identity = digest.hexdigest()
    store = TokenStore(path, stream, tokens, offsets, vocabulary_size, identity, end_of_document=end_of_document)
    try:
        store.check_tokens()
    except DataError:
        store.close()
        raise
    return store
