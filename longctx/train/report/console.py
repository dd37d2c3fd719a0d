"""A console that may go away: a closed pipe, a full disk or a lost terminal ends the display, never the run."""

from __future__ import annotations

import sys
from typing import Any


class Console:
    """A text stream whose failures are not raised. After the first failed write, everything is dropped.

    Args:
        stream: where text goes; None drops everything.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.lost = stream is None

    def write(self, text: str) -> int:
        """Write ``text``, with question marks for what the stream cannot encode; return its length."""
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
        """Push out what was written."""
        if not self.lost:
            self._try(self.stream.flush)

    def isatty(self) -> bool:
        """Say whether this leads to a terminal."""
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
    """Have this process survive the loss of its standard output and error, which libraries write to as well."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Console):
            setattr(sys, name, Console(stream))
