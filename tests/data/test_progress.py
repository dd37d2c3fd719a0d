"""Progress of a build: a line when a stage begins, while it goes on, and while a call is silent."""

from __future__ import annotations

import time

import pytest

from longctx.data import progress as module
from longctx.data.progress import Stages


def test_a_stage_is_said_at_its_start_and_while_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = [100.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    stages = Stages(said.append)
    for done in range(0, 6):
        clock[0] += 1
        stages("tokenising", done * 10**6, 100 * 10**6)
    stages("checking train.tokens", 0, 0)
    assert said == [
        "data: tokenising",
        "data: tokenising, 2 of 100 MB (2%)",
        "data: tokenising, 4 of 100 MB (4%)",
        "data: checking train.tokens",
    ]


def test_a_silent_call_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._LONGEST_SILENCE + module._POLL_SECONDS < 2
    monkeypatch.setattr(module, "_LONGEST_SILENCE", 0.15)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.02)
    said: list[tuple[float, str]] = []
    with Stages(lambda line: said.append((time.monotonic(), line)), "assigning documents to rows") as stages:
        time.sleep(0.5)
        stages("reading", 3 * 10**6, 0)
        time.sleep(0.5)
    count = len(said)
    assert count >= 4 and said[0][1].startswith("data: assigning documents to rows, ")
    assert said[-1][1].startswith("data: reading, 3 MB, ")
    time.sleep(0.3)
    assert len(said) == count  # its end is the end
