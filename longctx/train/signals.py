"""SIGTERM, SIGINT and SIGUSR1 ask for a stop at the next step's end; a second SIGINT stops at once.

Handlers only set a flag. The loop exchanges the flags of all ranks once a step, so that one signalled rank is enough
and all ranks save the same step. The exit code 75 (EX_TEMPFAIL) means: preempted, resume me.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """A context manager that catches the signals; ``raised`` is the name of the first one seen, else None."""

    def __init__(self) -> None:
        self.raised: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopFlag:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.raised is not None and number == signal.SIGINT:
            os._exit(128 + signal.SIGINT)  # asked twice: no save, no waiting for other ranks
        self.raised = self.raised or signal.Signals(number).name
