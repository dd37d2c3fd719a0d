"""DeepSpeed's own methods: ranks that are elsewhere are named, and batch sizes change over replicas, not ranks."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import pytest
import torch
from engine_tiny import make_engine, ragged_rows, run_ranks, run_window

from longctx.engine import stock
from longctx.errors import EngineError

from tolerances import tolerance


def elsewhere(rank: int, world: int, folder: str) -> list[str]:
    """Rank 1's loop ended a step early: it saves, or evaluates, while rank 0 takes its next window."""
    engine = make_engine(1, 1)
    rows = ragged_rows(0, 0, rank)
    messages = []
    for early in (
        lambda: engine.save_checkpoint(folder),
        lambda: engine.evaluate([rows]),
        lambda: engine.save_16bit_model(folder),
        lambda: engine.load_checkpoint(folder),
    ):
        with pytest.raises(EngineError) as error:
            early() if rank == 1 else engine.shard(rows)
        messages.append(str(error.value))
    run_window(engine, [rows])  # and training goes on
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)
    assert engine.global_steps == 1
    engine.destroy()
    return messages


def test_saving_and_evaluating_on_some_ranks_only_is_named_on_all() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for save, evaluate, save16, load in run_ranks(2, elsewhere, folder):
            for message, place in ((save, "save_checkpoint"), (evaluate, "evaluate"), (save16, "save_16bit_model")):
                assert f"rank 0 in engine.shard after 0 steps; rank 1 in engine.{place}" in message
            assert "rank 1 in engine.load_checkpoint" in load


def resized(rank: int, world: int, stage: int, offload: bool, changes: bool) -> list[float]:
    """Windows of 1 micro-batch, then of 3; ``changes``: by changing the size, else by an engine that was made so."""
    losses = []
    engine = make_engine(2, stage, gas=1 if changes else 3, offload=offload)
    if changes:
        with pytest.raises(EngineError, match="multiple of 2"):
            engine.set_train_batch_size(3)
        with pytest.raises(EngineError, match="positive integer"):
            engine.set_train_micro_batch_size(0)
        engine.set_train_batch_size(6)
    assert engine.gradient_accumulation_steps() == 3 and engine.train_batch_size() == 6
    for step in range(3):
        window = engine.shard([ragged_rows(step, index, 0) for index in range(3)])
        for batch in window:
            engine.backward(engine(**batch).loss)
            if batch is window[0] and changes:
                with pytest.raises(EngineError, match="middle of a window"):
                    engine.set_train_batch_size(2)
            engine.step()
        losses += [engine.global_loss, engine.grad_norm]
    engine.destroy()
    return losses


@pytest.mark.parametrize(
    ("stage", "offload"),
    [
        (0, False),
        pytest.param(1, False, marks=pytest.mark.deep),
        (2, True),
        pytest.param(3, False, marks=pytest.mark.deep),
    ],
)
def test_the_batch_size_changes_between_windows(stage: int, offload: bool) -> None:
    truth = run_ranks(2, resized, stage, offload, False)
    found = run_ranks(2, resized, stage, offload, True)
    torch.testing.assert_close(found, truth, rtol=tolerance("training norm"), atol=0)


def left_in_eval(rank: int, world: int) -> list[str]:
    engine = make_engine(1, 0)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(stock.__name__).addHandler(handler)
    for mode in (False, True, False, False):  # tuning in eval mode from the start is the caller's choice
        engine.train(mode)
        run_window(engine, [ragged_rows(0, 0, 0)])
    engine.evaluate([ragged_rows(0, 0, 0)])
    logging.getLogger(stock.__name__).removeHandler(handler)
    engine.destroy()
    return said


def test_a_model_left_in_eval_mode_is_said_once() -> None:
    (said,) = run_ranks(1, left_in_eval)
    assert len(said) == 1 and "engine.train()" in said[0]


def monitored(rank: int, world: int, folder: str) -> list[Any]:
    engine = make_engine(2, 1, csv_monitor={"enabled": True, "output_path": folder, "job_name": "run"})
    values = []
    for step in range(2):
        run_window(engine, [ragged_rows(step, 0, 0)])
        values.append((engine.global_loss, engine.grad_norm))
    engine.destroy()
    return values


def test_monitors_of_deepspeed_get_loss_and_norm(tmp_path: Any) -> None:
    values = run_ranks(2, monitored, str(tmp_path))[0]
    for column, name in enumerate(("train_loss", "grad_norm")):
        lines = (tmp_path / "run" / f"Train_Samples_{name}.csv").read_text().splitlines()
        assert [float(line.split(",")[1]) for line in lines[1:]] == [pair[column] for pair in values]
