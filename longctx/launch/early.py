"""Handle signals that arrive while a launcher checks the machine, compiles, or has not started any rank."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from longctx.train.signals import SIGNALS


class StoppedEarly(BaseException):
    """Raised when a signal asks for a stop before any rank was started, so that open contexts clean up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def caught() -> tuple[signal.Signals, ...]:
    """Return the signals that ask for a stop, with SIGHUP unless it is ignored (nohup)."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in SIGNALS if not (number == signal.SIGHUP and ignored))


@contextmanager
def stopping_early() -> Iterator[None]:
    """Raise StoppedEarly when a signal asks for a stop; a launcher with ranks installs its own handlers later."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedEarly(number)

    previous = {number: signal.signal(number, stop) for number in caught()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
