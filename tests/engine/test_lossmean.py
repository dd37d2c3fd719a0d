"""A mean over one rank's tokens is refused before the update; every other loss passes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_tiny import make_engine, ragged_rows, run_ranks

from longctx.engine.step import lossmean
from longctx.engine.step.rows import IGNORED
from longctx.errors import EngineError

from tolerances import tolerance

Batch = dict[str, Any]


def cross_entropy(engine: Any, batch: Batch, **options: Any) -> torch.Tensor:
    return F.cross_entropy(engine(**batch).logits.flatten(0, 1), batch["labels"].flatten(), **options)


def plain(engine: Any, batch: Batch) -> torch.Tensor:
    return cross_entropy(engine, batch)


def without_labels(engine: Any, batch: Batch) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "document_ids", "use_cache")}
    return F.cross_entropy(engine(**inputs).logits.flatten(0, 1), batch["shift_labels"].flatten())


def over_accumulation(engine: Any, batch: Batch) -> torch.Tensor:
    return cross_entropy(engine, batch) / engine.gradient_accumulation_steps()


def shifted_twice(engine: Any, batch: Batch) -> torch.Tensor:
    logits = engine(**batch).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def own(engine: Any, batch: Batch) -> torch.Tensor:
    return engine(**batch).loss


def token_mean(engine: Any, batch: Batch) -> torch.Tensor:
    losses = cross_entropy(engine, batch, reduction="none").view_as(batch["labels"])
    return engine.token_mean(losses, batch["shift_labels"])


def token_mean_without_labels(engine: Any, batch: Batch) -> torch.Tensor:
    """The labels are taken out of the batch, so that the model computes no loss of its own."""
    labels = batch["labels"]
    logits = engine(**{name: value for name, value in batch.items() if name != "labels"}).logits
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return engine.token_mean(losses, batch["shift_labels"])


def divided(engine: Any, batch: Batch) -> torch.Tensor:
    return cross_entropy(engine, batch, reduction="sum") / float(batch["num_items_in_batch"])


def smoothed(engine: Any, batch: Batch) -> torch.Tensor:
    losses = cross_entropy(engine, batch, reduction="none", label_smoothing=0.1).view_as(batch["labels"])
    return engine.token_mean(losses, batch["labels"])


def policy_gradient(engine: Any, batch: Batch) -> torch.Tensor:
    """GRPO's weighting by a constant length, not by the window's tokens."""
    logprobs = -cross_entropy(engine, batch, reduction="none").view_as(batch["labels"])
    ratio = (logprobs - logprobs.detach()).exp()
    return -(ratio * torch.tensor([[1.0], [-0.7]]) * (batch["labels"] != IGNORED)).sum() / 64


def distilled(engine: Any, batch: Batch) -> torch.Tensor:
    logits = engine(**batch).logits
    teacher = torch.linspace(-1, 1, logits.shape[-1]).softmax(-1).expand_as(logits)
    losses = F.kl_div(logits.log_softmax(-1), teacher, reduction="none").sum(-1)
    return engine.token_mean(losses, batch["labels"])


def smoothed_mean(engine: Any, batch: Batch) -> torch.Tensor:
    return cross_entropy(engine, batch, label_smoothing=0.1)


def trained(rank: int, world: int, name: str, ring: int, gas: int, windows: int = 3) -> tuple[str, list[float], int]:
    engine = make_engine(ring, 2, gas=gas)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(lossmean.__name__).addHandler(handler)
    losses, message = [], ""
    try:
        for step in range(windows):
            for batch in engine.shard([ragged_rows(step, index, engine.mesh.data_rank) for index in range(gas)]):
                engine.backward(globals()[name](engine, batch))
                engine.step()
            losses += [engine.global_loss, engine.grad_norm]
    except EngineError as error:
        message = str(error)
        assert engine.global_steps == 0  # before the first update
    logging.getLogger(lossmean.__name__).removeHandler(handler)
    engine.destroy()
    return message, losses, len(said)


@pytest.mark.parametrize(
    ("name", "ring", "gas", "said"),
    [
        ("plain", 2, 1, "2 times too large on 2 ranks"),
        ("plain", 1, 2, "mean over this rank's own tokens"),
        ("without_labels", 2, 2, "engine.token_mean"),
        ("over_accumulation", 2, 2, "mean over this rank's own tokens"),
        ("shifted_twice", 2, 1, "shifted already"),
    ],
)
def test_a_mean_over_a_shard_is_refused_before_the_first_update(name: str, ring: int, gas: int, said: str) -> None:
    for message, _, _ in run_ranks(2, trained, name, ring, gas, 1):
        assert said in message


@pytest.mark.parametrize("name", ["token_mean", "token_mean_without_labels", "divided"])
def test_losses_that_are_divided_equal_the_models_own(name: str) -> None:
    (_, truth, _), (_, found, _) = run_ranks(2, trained, "own", 2, 2)[0], run_ranks(2, trained, name, 2, 2)[0]
    torch.testing.assert_close(found, truth, rtol=tolerance("training loss"), atol=0)


@pytest.mark.parametrize("name", ["smoothed", "policy_gradient", "distilled"])
def test_losses_of_other_kinds_pass_without_a_word(name: str) -> None:
    for message, losses, said in run_ranks(2, trained, name, 2, 2):
        assert not message and len(losses) == 6 and said == 0


def test_means_of_replicas_pass_and_what_only_looks_like_a_mean_is_said_once() -> None:
    assert not run_ranks(2, trained, "plain", 1, 1)[0][0]
    assert not run_ranks(2, trained, "over_accumulation", 1, 2)[0][0]
    results = run_ranks(2, trained, "smoothed_mean", 2, 1)
    assert [(message, said) for message, _, said in results] == [("", 1), ("", 0)]


def test_token_mean_says_what_is_missing() -> None:
    with pytest.raises(EngineError, match="give labels to engine.shard"):
        lossmean.token_mean(torch.ones(1, 2), torch.ones(1, 2), None)
