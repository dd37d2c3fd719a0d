"""Sequence-level losses on gathered log-probabilities equal one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_tiny import make_engine, ragged_rows, run_ranks, tiny_llama

from tolerances import tolerance


def preferred(rank: int, world: int, stage: int) -> Any:
    """A sequence-level loss on gathered log-probabilities, and the same loss of one process."""
    from deepspeed.utils import safe_get_full_grad

    import longctx

    engine = make_engine(2, stage)
    rows = ragged_rows(3, 0, engine.mesh.data_rank)
    length = rows["input_ids"].shape[1]
    batch = engine.shard(rows)
    values = longctx.token_logprobs(engine(**batch).logits, batch["shift_labels"], engine.mesh, length=length)
    local = longctx.token_logprobs(engine(**batch).logits, batch["shift_labels"])
    assert torch.equal(engine.unshard(local, length=length), values)
    loss = torch.nn.functional.softplus(values[1].sum() - values[0].sum())  # not a sum over tokens
    engine.backward(loss, replicated=True)
    gradient = safe_get_full_grad(engine.module.lm_head.weight).clone()
    engine.step()
    found = engine.global_loss, gradient
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_a_preference_loss_on_gathered_log_probabilities(stage: int) -> None:
    from longctx.engine.step.rows import explicit_rows

    model, losses = tiny_llama(), []
    for replica in range(2):
        full = explicit_rows(ragged_rows(3, 0, replica))
        documents, length = full["document_ids"], full["input_ids"].shape[1]
        visible = (documents[:, :, None] == documents[:, None, :]) & torch.ones(length, length).tril().bool()
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
        logits = model(input_ids=full["input_ids"], position_ids=full["position_ids"], attention_mask=mask).logits
        labels = full["shift_labels"]
        values = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
        losses.append(torch.nn.functional.softplus(values[1].sum() - values[0].sum()))
    loss = torch.stack(losses).mean()
    loss.backward()
    gradient = model.lm_head.weight.grad
    for found, got in run_ranks(4, preferred, stage):
        assert found == pytest.approx(float(loss.detach()), rel=tolerance("training loss"))
        assert (got - gradient).norm() <= tolerance("training gradient") * gradient.norm()
