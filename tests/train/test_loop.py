"""The loop's bookkeeping; tests/train/test_resume.py and test_faults.py run whole loops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from longctx.errors import NonFiniteError
from longctx.train.checkpoint.manifest import Progress
from longctx.train.loop import Loop, LoopResult


def loop(steps: int) -> Loop:
    """Return a loop whose job has no engine: only what the bookkeeping reads."""
    found = object.__new__(Loop)
    loader = SimpleNamespace(samples_per_window=4, row_ids=lambda begin: torch.arange(begin, begin + 4))
    corpus, config = SimpleNamespace(train="train.tokens"), SimpleNamespace(train=SimpleNamespace(steps=steps))
    found.job = SimpleNamespace(loader=loader, config=config, corpus=corpus)  # type: ignore[assignment]
    found.outcome = LoopResult(Progress())
    return found


def test_progress_adds_up_and_a_request_in_the_last_step_is_no_stop() -> None:
    one: Any = loop(steps=2)
    one._advance(1, 100, 0.5, 7, stopped=True)
    assert one.outcome == LoopResult(Progress(1, 4, 100), True, 0.0, 0.5, 100, 7)
    one._advance(2, 50, 0.25, 5, stopped=True)
    assert one.outcome == LoopResult(Progress(2, 8, 150), False, 0.0, 0.75, 150, 7)


def test_a_loss_that_is_not_finite_names_its_rows() -> None:
    one: Any = loop(steps=9)
    one.outcome.progress = Progress(2, 8, 0)
    text = str(one._named(NonFiniteError("the loss is nan"), 3))
    assert text.startswith("the loss is nan. It was step 3, samples 8 to 11, rows 8, 9, 10, 11 of train.tokens")
