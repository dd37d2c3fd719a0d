"""Decide when a job is over and with which exit code: from its ranks' exit codes, signals and two deadlines."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType

from longctx.launch.early import caught
from longctx.train.signals import PREEMPTED

GRACE_SECONDS = 3.0  # between the first failure and the kill: others may be about to report the real cause
STOP_SECONDS = 300.0  # for saving a checkpoint after a request to stop
FAILED = -1  # `exit_code`'s answer when a rank failed; the launcher reports the cause and chooses the code


class Watch:
    """The signals that one job received, and when its first rank failed."""

    def __init__(self) -> None:
        self.signal = 0
        """the first signal that asked for a stop; 0 if none did"""
        self._stop_requested_at = self._failed_at = 0.0
        self._interrupted = False

    @contextmanager
    def handling_signals(self, forward: Callable[[int], None]) -> Iterator[None]:
        """Pass signals to ``forward`` (to send them to the ranks); any SIGINT after the first request to stop ends the
        job instead: a person at the terminal does not want to wait for the checkpoint.

        SIGUSR2 is passed on too, but does not ask for a stop: ranks answer it with their stack traces.
        """

        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.signal:
                self._interrupted = True
                return
            if number != signal.SIGUSR2:
                self._stop_requested_at = self._stop_requested_at or time.monotonic()
                self.signal = self.signal or number
            forward(number)

        previous = {number: signal.signal(number, handle) for number in (*caught(), signal.SIGUSR2)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def exit_code(self, ended: Collection[int], world: int, failed: bool) -> int | None:
        """Return the job's exit code, FAILED to have the cause reported, or None to go on waiting.

        Args:
            ended: exit codes of the ranks that have ended.
            world: number of ranks.
            failed: whether a rank ended or was lost in a way that leaves the others waiting for it.
        """
        now = time.monotonic()
        if self._interrupted:
            return 130
        if failed:
            self._failed_at = self._failed_at or now
            if len(ended) == world or now - self._failed_at > GRACE_SECONDS:
                return FAILED
        elif len(ended) == world:
            return PREEMPTED if PREEMPTED in ended else 0
        if self.signal and now - self._stop_requested_at > STOP_SECONDS:
            print(f"longctx: not stopped {STOP_SECONDS:.0f} s after the request; killing", file=sys.stderr, flush=True)
            return 1
        return None
