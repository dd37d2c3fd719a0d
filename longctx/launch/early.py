"""Signals that come while a launcher still looks at the machine, compiles, or has not started every rank."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from longctx.train.signals import SIGNALS


class StoppedEarly(BaseException):
    """A signal asked for the end before any rank was started; it unwinds what was begun."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def caught() -> tuple[signal.Signals, ...]:
    """Return the signals that ask for a stop here: SIGHUP too, unless nohup has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in SIGNALS if not (number == signal.SIGHUP and ignored))


@contextmanager
def stopping_early() -> Iterator[None]:
    """Raise StoppedEarly when a signal asks for a stop, until a launcher that has ranks takes the signals over."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedEarly(number)

    previous = {number: signal.signal(number, stop) for number in caught()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
