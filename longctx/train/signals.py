"""SIGTERM, SIGINT, SIGUSR1 and SIGHUP request a stop: immediate before the first step, later at the end of a step.

During training the handlers only set a flag. The loop gathers all ranks' flags once per step, so one signalled rank is
enough and all ranks save the same step. Exit code 75 (EX_TEMPFAIL) means preempted: start again to resume. A SIGINT
after any of these signals exits at once. Before training there is nothing to save, and the main thread may be inside a
library call for minutes; so a separate thread receives the signals and ends the process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def code_of(number: int) -> int:
    """Return the exit code of a job that a signal stopped before its first step: 130, 143, or 75 for SIGUSR1."""
    return {signal.SIGINT: 130, signal.SIGUSR1: PREEMPTED}.get(signal.Signals(number), 143)


def sentence_of(number: int) -> str:
    """Return the message for a job that a signal stopped before its first step."""
    return f"stopped by {signal.Signals(number).name} before the first step; nothing was lost, start again to train"


class StopFlag:
    """A context manager that catches the signals; ``raised`` is the name of the first one received, else None.

    Args:
        before_training: called in a separate thread with the number of a signal that arrives before ``training`` is
            called; it ends the process. None: such a signal stops the run after its first step.
    """

    def __init__(self, before_training: Callable[[int], None] | None = None) -> None:
        self.raised: str | None = None
        self._previous: dict[int, object] = {}
        self._before = before_training
        self._ends: tuple[int, int] | None = None

    def __enter__(self) -> StopFlag:
        if self._before is not None:
            # Python runs signal handlers in the main thread only, between bytecodes: never while it is inside a library
            # call. The interpreter writes signal numbers to this pipe at once, and the thread reads them.
            self._ends = os.pipe()
            os.set_blocking(self._ends[1], False)
            signal.set_wakeup_fd(self._ends[1], warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(self._ends[0],), daemon=True, name="signals").start()
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.training()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def training(self) -> None:
        """Declare that training starts: from now on a signal stops the run after the current step is saved."""
        if self._ends is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._ends[1])
            self._ends = None

    def _listen(self, end: int) -> None:
        while numbers := os.read(end, 64):
            for number in numbers:
                if number in SIGNALS and self._ends is not None and self._before is not None:
                    self._before(number)
        os.close(end)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.raised is not None and number == signal.SIGINT:
            os._exit(128 + signal.SIGINT)  # do not save, do not wait for other ranks
        self.raised = self.raised or signal.Signals(number).name
