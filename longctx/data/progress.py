"""Report the stages of a build, so that it is never silent for two seconds, not even in a call that reports nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_SECONDS = 1.2  # between two lines of a stage that reports
_LONGEST_SILENCE = 1.5
_POLL_SECONDS = 0.1


class Stages:
    """Says which stage has begun and how far it is; in a ``with`` block a thread speaks when nothing else does.

    Args:
        say: prints one line.
        first: what happens until a stage is reported; not said unless it takes long.
    """

    def __init__(self, say: Callable[[str], None], first: str = "looking for token files") -> None:
        self.say, self.stage, self.last = say, first, time.monotonic()
        self._began, self._far = self.last, ""
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="longctx-progress", daemon=True)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` bytes of a stage are done (``total`` 0: unknown)."""
        with self._lock:
            now = time.monotonic()
            of = f" of {total / 1e6:,.0f} MB ({done / total:.0%})" if total else " MB"
            self._far = f", {done / 1e6:,.0f}{of}" if done else ""
            if stage != self.stage:
                self.stage, self._began = stage, now
                self._line(stage, now)
            elif now - self.last >= _SECONDS:
                self._line(f"{stage}{self._far}", now)

    def _line(self, text: str, now: float) -> None:
        self.last = now
        self.say(f"data: {text}")

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            with self._lock:
                now = time.monotonic()
                if now - self.last >= _LONGEST_SILENCE:
                    self._line(f"{self.stage}{self._far}, {now - self._began:,.0f} s", now)

    def __enter__(self) -> Stages:
        self.last = self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
