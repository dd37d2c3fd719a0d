"""A file compressed with zstd, read through the package ``zstandard``: any number of frames; a truncated one raises."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from longctx.errors import MissingPackageError

_CHUNK_BYTES = 2**12  # of compressed data at once, which expands to 128 MiB at most
_LARGEST_WINDOW = 2**31  # of `zstd --long=31`


class ZstdReader:
    """Reads the decompressed bytes of a stream; can only be rewound to its beginning.

    Args:
        raw: the compressed stream, at its beginning.
        file: its path, for messages.

    Raises:
        MissingPackageError: ``zstandard`` is not installed.
    """

    def __init__(self, raw: BinaryIO, file: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise MissingPackageError(
                f"{file}: reading zstd needs the package `zstandard`: pip install 'longctx[data]', or decompress the "
                "file: zstd -d"
            ) from None
        self._raw, self._package = raw, zstandard
        self.seek(0)

    def seek(self, place: int) -> None:
        """Go back to the beginning (``place`` 0)."""
        assert place == 0
        self._raw.seek(0)
        self._buffer, self._ended = bytearray(), False
        self._frame: Any = None

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most ``size``; none at the end. Raises: EOFError, OSError: truncated, damaged."""
        while len(self._buffer) < size and not self._ended:
            self._expand(self._raw.read(_CHUNK_BYTES))
        found = bytes(self._buffer[:size])
        del self._buffer[:size]
        return found

    def _expand(self, data: bytes) -> None:
        self._ended = not data
        if self._ended and self._frame is not None:
            raise EOFError("compressed file ended before the end of a frame")
        while data:
            if self._frame is None:
                decompressor = self._package.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
                self._frame = decompressor.decompressobj()
            try:
                self._buffer += self._frame.decompress(data)
            except self._package.ZstdError as error:
                raise OSError(str(error)) from None
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None

    def __enter__(self) -> ZstdReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass
