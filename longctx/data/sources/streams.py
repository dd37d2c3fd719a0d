"""Open files and read their text in parts: decompressed and decoded; errors name the position."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longctx.data.sources.formats import HEAD_BYTES, ZSTD, require_promise
from longctx.data.sources.zstd import ZstdReader
from longctx.errors import DataError

_CHUNK_BYTES = 2**20
_COMPRESSIONS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ\0": lzma.open,
    **{b"BZh" + bytes([level]) + b"1AY&SY": bz2.open for level in b"123456789"},
}
_SUFFIXES = (".gz", ".xz", ".bz2", ".zst")


class Stream:
    """The bytes of one file, decompressed.

    Attributes:
        file: the path.
        suffix: of its name, without that of a compression.
        head: the first bytes (at most ``HEAD_BYTES``); ``whole``: the file has no more.
    """

    def __init__(self, file: Path, raw: Any, compressed: bool) -> None:
        self.file, self._raw = file, raw
        self.suffix = file.with_suffix("").suffix if compressed and file.suffix in _SUFFIXES else file.suffix
        self.head = self._head()
        self.whole = len(self.head) < HEAD_BYTES

    def read(self, size: int = _CHUNK_BYTES) -> bytes:
        """Return the next bytes, at most ``size``; none at the end. Raises: DataError."""
        return bytes(self._guarded(self._raw.read, size))

    def rewind(self) -> None:
        """Go back to the beginning. Raises: DataError."""
        self._guarded(self._raw.seek, 0)

    def lines(self, longest: int) -> Iterator[bytes | bytearray]:
        """Yield lines with their ends. Raises: DataError: damaged, or a line of more than ``longest`` bytes."""
        number, rest = 1, bytearray()  # a long line is extended in place, without a copy
        while data := self.read():
            begin = 0
            while end := data.find(b"\n", begin) + 1:
                if rest:
                    rest += data[begin:end]
                    yield rest
                    rest = bytearray()
                else:
                    yield data[begin:end]
                begin, number = end, number + 1
            rest += data[begin:]
            if len(rest) > longest:
                raise DataError(f"{self.file}:{number}: a line of more than {longest} bytes; is this JSON lines?")
        if rest:
            yield rest

    def text(self) -> Iterator[str]:
        """Yield the text in parts, exactly (line ends are kept, a byte order mark is not).

        Raises:
            DataError: not UTF-8, or a zero byte (naming the offset).
        """
        offset, rest, data = 0, b"", self.read()
        while data or rest:
            raw = rest + data
            try:
                text, used = codecs.utf_8_decode(raw, "strict", not data)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self.file}: offset {offset + error.start}: binary or not UTF-8; give UTF-8 text (if it is in "
                    "another encoding, say Latin-1, convert it: `iconv -f LATIN1 -t UTF-8`), or name it in data.exclude"
                ) from None
            if (zero := raw.find(b"\0", 0, used)) >= 0:
                raise DataError(
                    f"{self.file}: offset {offset + zero}: binary (a zero byte); give UTF-8 text, or name it in "
                    "data.exclude"
                )
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset, rest, data = offset + used, raw[used:], self.read()

    def blank(self) -> bool:
        """Return whether the file is blank. Raises: DataError."""
        self.rewind()
        data = self.read().removeprefix(codecs.BOM_UTF8)
        while data and not data.strip():
            data = self.read()
        self.rewind()
        return not data

    def _head(self) -> bytes:
        head = b""
        while len(head) < HEAD_BYTES and (data := self.read(HEAD_BYTES - len(head))):
            head += data
        self.rewind()
        return head

    def _guarded(self, call: Callable[..., Any], *arguments: int) -> Any:
        try:
            return call(*arguments)
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:  # raised for damaged archives
            raise DataError(
                f"{self.file}: cannot be read on, it is damaged: {error}; copy it again, or name it in data.exclude"
            ) from None


@contextmanager
def opened(file: Path) -> Iterator[Stream]:
    """Open a file; gzip, bzip2, xz and zstd are recognised by content and decompressed.

    Raises:
        DataError: no permission, or content that contradicts its suffix.
        MissingPackageError: zstd, and ``zstandard`` is not installed.
    """
    try:
        raw = open(file, "rb")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    with raw:
        first = raw.read(16)
        require_promise(first, file)
        raw.seek(0)
        unpack = next((unpack for mark, unpack in _COMPRESSIONS.items() if first.startswith(mark)), None)
        if first.startswith(ZSTD):
            yield Stream(file, ZstdReader(raw, file), compressed=True)
            return
        if unpack is None:
            yield Stream(file, raw, compressed=False)
            return
        with unpack(raw) as inner:
            yield Stream(file, inner, compressed=True)
