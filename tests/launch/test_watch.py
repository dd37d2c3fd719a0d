"""When a job ends, and with which exit code."""

from __future__ import annotations

import os
import signal

import pytest

from longctx.launch import watch
from longctx.launch.early import caught
from longctx.launch.watch import FAILED, Watch


def test_exit_codes_of_jobs_whose_ranks_end_by_themselves() -> None:
    assert Watch().exit_code([], 2, False) is None and Watch().exit_code([0], 2, False) is None
    assert Watch().exit_code([0, 0], 2, False) == 0
    assert Watch().exit_code([0, 75], 2, False) == 75


def test_a_failure_is_reported_when_all_have_ended_or_after_a_grace_period(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Watch().exit_code([1, 0], 2, True) == FAILED
    job = Watch()
    assert job.exit_code([1], 2, True) is None  # the other rank may be about to report the cause
    monkeypatch.setattr(watch, "GRACE_SECONDS", -1.0)
    assert job.exit_code([1], 2, True) == FAILED


def test_signals_are_forwarded_and_a_sigint_after_a_request_ends_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, forwarded, before = Watch(), [], signal.getsignal(signal.SIGINT)
    with job.handling_signals(forwarded.append):
        os.kill(os.getpid(), signal.SIGUSR2)
        assert forwarded == [signal.SIGUSR2] and job.signal == 0  # asks for stack traces, not for a stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert forwarded == [signal.SIGUSR2, signal.SIGTERM] and job.signal == signal.SIGTERM
        assert job.exit_code([], 2, False) is None
        monkeypatch.setattr(watch, "STOP_SECONDS", -1.0)
        assert job.exit_code([], 2, False) == 1 and "after the request; killing" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        assert forwarded[2:] == [] and job.exit_code([], 2, False) == 130
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("first", caught())
def test_only_a_sigint_after_any_request_to_stop_ends_the_job(first: signal.Signals) -> None:
    job, forwarded = Watch(), []
    with job.handling_signals(forwarded.append):
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler repeats its request: go on saving
        assert forwarded == [first, signal.SIGTERM] and job.exit_code([], 2, False) is None
        os.kill(os.getpid(), signal.SIGINT)
        assert len(forwarded) == 2 and job.signal == first and job.exit_code([], 2, False) == 130
