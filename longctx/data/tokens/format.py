"""The header of a token file: 256 bytes with the sizes and checksums needed to verify and map the rest.

    offset  size  field
         0     8  magic ``\\x89LCTOK\\r\\n`` (a text-mode copy or a 7-bit channel breaks it, as with PNG)
         8     4  version: 2 if any token is ignored by the loss, else 1
        12     4  bytes per token: 2 (uint16) or 4 (uint32)
        16     8  vocabulary size; every token is below it
        24     8  tokens
        32     8  documents
        40     8  id of the token that ends a document of text, or -1
        48     8  bytes of document names
        56     8  bytes of metadata (JSON)
        64    32  hash of the tokenizer (sha256)
        96    32  sha256 of everything after the header
       128     8  borders of ignored tokens (version 2), else zero
       136    88  zero
       224    32  sha256 of bytes 0 to 223

Sections follow in this order, each aligned to 8 bytes and little-endian: tokens, document offsets (documents + 1,
uint64, in tokens), name offsets (documents + 1, uint64, in bytes), names (UTF-8), metadata, and in version 2 the
borders of ignored tokens (uint64, rising): tokens ``borders[0]`` to ``borders[1] - 1``, ``borders[2]`` to
``borders[3] - 1``, … are never labels. Their offsets follow from the counts, and the resulting file size is checked
before anything is mapped.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

from longctx.errors import DataError

MAGIC = b"\x89LCTOK\r\n"
VERSIONS = (1, 2)
HEADER_BYTES = 256
MAX_METADATA_BYTES = 16 * 2**20
MAX_VOCABULARY = 2**32

_FIELDS = struct.Struct("<8sIIQQQqQQ32s32sQ")
_CHECKED_BYTES = HEADER_BYTES - 32
_REBUILD = "build it again with `longctx data build`"


@dataclass(frozen=True)
class Header:
    """The counts and hashes of one token file."""

    token_bytes: int
    vocabulary_size: int
    token_count: int
    document_count: int
    end_of_document: int
    names_bytes: int
    metadata_bytes: int
    tokenizer_hash: bytes
    payload_hash: bytes
    ignored_count: int = 0  # borders of ignored tokens, two per run

    # Where each section begins. Python integers: no overflow, whatever a damaged file claims.

    @property
    def offsets_at(self) -> int:
        return aligned(HEADER_BYTES + self.token_count * self.token_bytes)

    @property
    def name_offsets_at(self) -> int:
        return self.offsets_at + 8 * (self.document_count + 1)

    @property
    def names_at(self) -> int:
        return self.name_offsets_at + 8 * (self.document_count + 1)

    @property
    def metadata_at(self) -> int:
        return aligned(self.names_at + self.names_bytes)

    @property
    def ignored_at(self) -> int:
        end = self.metadata_at + self.metadata_bytes
        return aligned(end) if self.ignored_count else end

    @property
    def file_bytes(self) -> int:
        return self.ignored_at + 8 * self.ignored_count

    def pack(self) -> bytes:
        """Return the 256 bytes of this header."""
        fields = _FIELDS.pack(
            MAGIC,
            2 if self.ignored_count else 1,
            self.token_bytes,
            self.vocabulary_size,
            self.token_count,
            self.document_count,
            self.end_of_document,
            self.names_bytes,
            self.metadata_bytes,
            self.tokenizer_hash,
            self.payload_hash,
            self.ignored_count,
        ).ljust(_CHECKED_BYTES, b"\0")
        return fields + hashlib.sha256(fields).digest()


def aligned(offset: int) -> int:
    """Return the next multiple of 8."""
    return -(-offset // 8) * 8


def parse(raw: bytes, file_bytes: int, path: Path) -> Header:
    """Read a header and check it against the size of its file.

    Args:
        raw: the first 256 bytes of the file (fewer if it is shorter).
        file_bytes: size of the whole file.

    Raises:
        DataError: not a token file, another version, damaged, truncated or too long.
    """
    if file_bytes == 0:
        raise DataError(f"{path} is empty: no token file was written here; {_REBUILD}")
    if raw[: len(MAGIC)] != MAGIC[: len(raw)]:
        raise DataError(f"{path}: offset 0: {_foreign(raw)}")
    if len(raw) < HEADER_BYTES:
        raise DataError(
            f"{path}: offset {len(raw)}: truncated inside its {HEADER_BYTES}-byte header; copy it again or {_REBUILD}"
        )
    version = struct.unpack_from("<I", raw, 8)[0]
    if hashlib.sha256(raw[:_CHECKED_BYTES]).digest() != raw[_CHECKED_BYTES:HEADER_BYTES]:
        raise DataError(f"{path}: offset 0: the header's checksum is wrong, the file is damaged; {_REBUILD}")
    if version not in VERSIONS:
        raise DataError(
            f"{path}: offset 8: token file version {version}, this longctx reads versions {VERSIONS[0]} to "
            f"{VERSIONS[-1]}; "
            f"update longctx or {_REBUILD}"
        )
    header = Header(*_FIELDS.unpack_from(raw)[2:])
    _check_fields(header, version, path)
    if header.file_bytes > file_bytes:
        raise DataError(
            f"{path}: offset {file_bytes}: truncated, its header states {header.file_bytes} bytes "
            f"({header.token_count} tokens); copy it again or {_REBUILD}"
        )
    if header.file_bytes < file_bytes:
        raise DataError(
            f"{path}: offset {header.file_bytes}: {file_bytes - header.file_bytes} bytes follow the end that its "
            f"header states; copy it again or {_REBUILD}"
        )
    return header


def _check_fields(header: Header, version: int, path: Path) -> None:
    if header.token_bytes not in (2, 4):
        raise DataError(f"{path}: offset 12: {header.token_bytes} bytes per token; 2 and 4 are known; {_REBUILD}")
    if not 0 < header.vocabulary_size <= MAX_VOCABULARY:
        raise DataError(f"{path}: offset 16: a vocabulary of {header.vocabulary_size} tokens; {_REBUILD}")
    if header.token_bytes == 2 and header.vocabulary_size > 2**16:
        raise DataError(f"{path}: offset 16: {header.vocabulary_size} tokens do not fit in uint16; {_REBUILD}")
    if not -1 <= header.end_of_document < header.vocabulary_size:
        raise DataError(f"{path}: offset 40: end-of-document token {header.end_of_document}; {_REBUILD}")
    if header.metadata_bytes > MAX_METADATA_BYTES:
        raise DataError(f"{path}: offset 56: {header.metadata_bytes} bytes of metadata; {_REBUILD}")
    if not 0 < header.document_count <= header.token_count:
        raise DataError(
            f"{path}: offset 24: {header.token_count} tokens in {header.document_count} documents: a token file needs "
            f"at least one document, and a token in each; give more text"
        )
    if header.ignored_count % 2 or (header.ignored_count > 0) != (version > 1):
        raise DataError(
            f"{path}: offset 128: {header.ignored_count} borders of ignored tokens in version {version}; {_REBUILD}"
        )


def _foreign(raw: bytes) -> str:
    """Describe a file that is not a token file."""
    readers = "longctx.data.sources.readers"
    if raw.startswith(b"MMIDIDX"):
        return f"this is a Megatron index; import it with {readers}.read_megatron"
    if raw[:2] == b"PK":
        return "this is a zip archive, not a token file"
    if raw.startswith(MAGIC[:6]):
        return "line ends were changed by a copy in text mode; copy it in binary mode"
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        if error.end < len(raw) - 3:
            return (
                "not a longctx token file (raw nanoGPT, Megatron or datatrove tokens have no header: import them with "
                f"{readers}); {_REBUILD}"
            )
    return "this is text, not a token file; build one with `longctx data build`"
