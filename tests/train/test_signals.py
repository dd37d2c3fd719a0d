"""Signals during training set a flag; before it they reach a separate thread."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from longctx.train.signals import SIGNALS, StopFlag, code_of, sentence_of


@pytest.fixture(autouse=True)
def no_nohup() -> Iterator[None]:
    """Undo nohup, under which a run leaves SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert stop.raised is None
        os.kill(os.getpid(), number)
        assert stop.raised == number.name
    assert signal.getsignal(number) == before


def test_before_training_another_thread_answers_and_later_the_flag() -> None:
    answered: list[tuple[int, bool]] = []
    done = threading.Event()

    def answer(number: int) -> None:
        answered.append((number, threading.current_thread() is threading.main_thread()))
        done.set()

    with StopFlag(before_training=answer) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert done.wait(10) and answered == [(signal.SIGTERM, False)]
        stop.training()
        os.kill(os.getpid(), signal.SIGUSR1)
    assert len(answered) == 1 and stop.raised == "SIGTERM"


def test_codes_and_messages() -> None:
    assert [code_of(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)] == [130, 143, 75, 143]
    assert sentence_of(signal.SIGTERM).startswith("stopped by SIGTERM before the first step")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_sigint_after_any_request_exits_at_once(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with StopFlag() as stop:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert codes == []
        os.kill(os.getpid(), signal.SIGINT)
    assert codes == [130] and stop.raised == number.name
