"""A text stream that survives the loss of its console: a closed pipe, full disk or lost terminal never ends the run."""

from __future__ import annotations

import sys
from typing import Any


class Console:
    """A text stream whose failures are not raised. After the first failed write, everything is dropped.

    Args:
        stream: the underlying stream; None drops everything.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.lost = stream is None

    def write(self, text: str) -> int:
        """Write ``text``, with ``?`` for characters that the stream cannot encode; return its length."""
        if not self.lost:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = getattr(self.stream, "encoding", None) or "ascii"
                self._try(self.stream.write, text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError):  # ValueError: the stream is closed
                self.lost = True
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        if not self.lost:
            self._try(self.stream.flush)

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return not self.lost and bool(self._try(self.stream.isatty))

    def _try(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except (OSError, ValueError):
            self.lost = True
            return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard_standard_streams() -> None:
    """Wrap stdout and stderr, to which libraries write too, so that this process survives their loss."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Console):
            setattr(sys, name, Console(stream))
