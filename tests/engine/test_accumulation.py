"""A window ends with its last micro-batch, however long it is and however often the loop calls step()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_tiny import make_engine, make_optimizer, ragged_rows, run_ranks, tiny_llama, unsharded_loss, weights_of

from longctx.engine.step.accumulation import Accumulation, find_mark, mark_batches
from longctx.errors import EngineError

from tolerances import tolerance

GAS, SIZES = 3, (3, 2, 3, 1)  # the last window of two epochs is short


def train(engine: Any, style: str) -> dict[str, Any]:
    """Train on windows of ``SIZES`` micro-batches, in one of the ways in which loops are written."""
    losses, norms = [], []
    for step, size in enumerate(SIZES):
        rows = [ragged_rows(step, index, engine.mesh.data_rank) for index in range(size)]
        window = engine.shard(rows, last=size < GAS)
        if style == "sum":
            engine.backward(sum(engine(**batch).loss for batch in window))
            engine.step()
        for batch in window if style != "sum" else ():
            engine.backward(engine(**batch).loss)
            if style == "each":
                engine.step()
        if style == "once":
            engine.step()
        losses.append(engine.global_loss)
        norms.append(engine.grad_norm)
    assert engine.global_steps == len(SIZES)
    return {"losses": losses, "norms": norms, "weights": weights_of(engine)}


def styles(rank: int, world: int, stage: int) -> list[dict[str, Any]]:
    results = []
    for style in ("each", "once", "sum"):
        engine = make_engine(2, stage, gas=GAS)
        results.append(train(engine, style))
        engine.destroy()
    return results


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    model = tiny_llama()
    optimizer = make_optimizer("sgd", model.parameters())
    losses, norms = [], []
    for step, size in enumerate(SIZES):
        optimizer.zero_grad()
        parts = [unsharded_loss(model, ragged_rows(step, index, 0)) for index in range(size)]
        loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
        loss.backward()
        norms.append(float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))))
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms, "weights": {n: p.detach() for n, p in model.named_parameters()}}


@pytest.mark.parametrize("stage", [0, 1, 2, pytest.param(3, marks=pytest.mark.deep)])
def test_short_windows_and_one_step_a_window_equal_one_process(stage: int, truth: dict[str, Any]) -> None:
    for results in run_ranks(2, styles, stage):
        for found in results:
            torch.testing.assert_close(found["losses"], truth["losses"], rtol=tolerance("training loss"), atol=0)
            torch.testing.assert_close(found["norms"], truth["norms"], rtol=tolerance("training norm"), atol=0)
            for name, weight in truth["weights"].items():
                assert (found["weights"][name] - weight).norm() <= tolerance("training weight") * weight.norm(), name


def dropped(rank: int, world: int) -> list[list[float]]:
    losses = []
    for style in ("each", "once", "sum"):
        engine = make_engine(2, 1, gas=GAS, model=tiny_llama(attention_dropout=0.3))
        engine.train()
        losses.append(train(engine, style)["losses"])
        engine.destroy()
    return losses


def test_micro_batches_draw_their_own_dropout_however_often_step_is_called() -> None:
    each, once, total = run_ranks(2, dropped)[0]
    torch.testing.assert_close([once, total], [each, each], rtol=tolerance("training loss"), atol=0)


def misused(rank: int, world: int) -> list[str]:
    engine = make_engine(2, 1, gas=2)
    rows = [ragged_rows(0, index, engine.mesh.data_rank) for index in range(3)]
    messages = []

    def refused(action: Any) -> None:
        with pytest.raises(EngineError) as error:
            action()
        messages.append(str(error.value))

    engine.eval()  # what a generation in between may leave behind
    refused(lambda: engine.shard(rows[0]))
    refused(lambda: engine.weigh([engine.shard(rows[:2])[0]]))
    engine.train()
    refused(lambda: engine.shard(rows))
    refused(lambda: engine.shard(rows[:1] if rank == 0 else rows[:2]))
    with torch.no_grad():
        looked_at = engine.shard(rows[0])
        engine(**looked_at)
    refused(lambda: engine(**looked_at))
    left, window = engine.shard(rows[:2]), engine.shard(rows[1:])
    engine.backward(engine(**left[0]).loss)
    for batch in window[:1]:
        engine.backward(engine(**batch).loss)
    refused(lambda: [engine.backward(engine(**window[1]).loss), engine.step()])
    engine.destroy()
    return messages


def test_windows_that_are_not_one_step_are_refused_in_eval_mode_too() -> None:
    for one, weighed, three, alone, looked_at, left in run_ranks(2, misused):
        assert all("gradient_accumulation_steps is 2" in message for message in (one, weighed, three))
        assert "gradient_accumulation_steps is 2" in alone or "ranks [0] rejected" in alone
        assert "torch.no_grad()" in looked_at and "2 micro-batches was trained in part only (1)" in left


def test_micro_batches_may_come_in_any_order_and_windows_again() -> None:
    batches = [{"input_ids": torch.zeros(1, 2, dtype=torch.long)} for _ in range(2)]
    given = batches[0]["input_ids"]
    mark_batches(batches)
    assert find_mark({"input_ids": given}) is None  # the caller's own tensor is not marked
    for _ in range(2):  # two optimizer steps on one window
        steps = Accumulation()
        steps.note_forward(find_mark(batches[1]))
        assert steps.is_last() is False
        steps.note_backward()
        steps.note_forward(find_mark(batches[0]))
        steps.note_backward()
        assert steps.is_last() is True
        steps.check_complete()
    steps.note_forward(None)
    assert steps.is_last() is None
