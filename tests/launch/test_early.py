"""Signals before any rank was started."""

from __future__ import annotations

import os
import signal

import pytest

from longctx.launch.early import StoppedEarly, caught, stopping_early


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_unwinds_the_block_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StoppedEarly) as stop, stopping_early():
        os.kill(os.getpid(), number)
        signal.pause()
    assert stop.value.number == number and signal.getsignal(number) == before


def test_sighup_is_left_alone_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in caught()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in caught()
    finally:
        signal.signal(signal.SIGHUP, before)
