"""Losses of longctx.hf: label smoothing, compute_loss_func, compute_loss, and models that ignore the count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tiny import arguments, collate, history, packed_rows, reference, run_ranks, tiny_model, windows_of


def shifting(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """As users write it: it shifts by itself."""
    logits, labels = outputs.logits[:, :-1].float(), labels[:, 1:]
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / num_items_in_batch


def library(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(outputs.logits, labels, outputs.logits.shape[-1], num_items_in_batch)


def mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def forgetful(model: Any, how: str) -> Any:
    """A model that does not divide by num_items_in_batch, as BERT's heads do not."""
    if how == "says so":
        type(model).accepts_loss_kwargs = False
    loss = type(model).loss_function.fget(model)
    model.loss_function = lambda *a, num_items_in_batch=None, **k: loss(*a, **k)
    return model


def trained(rank: int, world: int, folder: str, kind: str, ring: int, given: dict[str, Any]) -> Any:
    from transformers import LlamaForCausalLM, TrainingArguments

    import longctx

    functions = {"shifting": shifting, "library": library, "mean": mean}
    model = tiny_model()
    try:
        if kind in ("says so", "silent"):
            model = forgetful(model, kind)
        args = TrainingArguments(**arguments(folder, "ddp", **given))
        trainer = longctx.hf.Trainer(
            model=model, args=args, train_dataset=packed_rows(12), data_collator=collate,
            mesh=longctx.Mesh(ring=ring), compute_loss_func=functions.get(kind),
        )  # fmt: skip
        try:
            trainer.train()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return history(trainer)
    finally:
        if "accepts_loss_kwargs" in vars(LlamaForCausalLM):
            del LlamaForCausalLM.accepts_loss_kwargs


@pytest.mark.parametrize("kind", ["shifting", "library", "says so", "silent"])
def test_losses_of_ones_own_train_as_one_process(tmp_path: Path, kind: str) -> None:
    losses, norms, _ = reference(windows_of(packed_rows(12), 3, 2))
    for found in run_ranks(2, trained, str(tmp_path), kind, 2, {}):
        assert found["losses"] == pytest.approx(losses, abs=1e-6)
        assert found["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("kind", ["", "says so"])
def test_label_smoothing(tmp_path: Path, kind: str) -> None:
    losses, norms, _ = reference(windows_of(packed_rows(12), 3, 2), smoothing=0.1)
    for found in run_ranks(2, trained, str(tmp_path), kind, 2, {"label_smoothing_factor": 0.1}):
        assert found["losses"] == pytest.approx(losses, abs=1e-6)
        assert found["norms"] == pytest.approx(norms, rel=1e-5)


def test_a_mean_over_local_tokens_is_refused_on_every_rank(tmp_path: Path) -> None:
    for message in run_ranks(2, trained, str(tmp_path), "mean", 2, {}):
        assert message.startswith("EngineError: compute_loss_func does not divide a sum over tokens")


def masked_model() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip


def masked_rows() -> list[dict[str, torch.Tensor]]:
    """Labels at the tokens themselves, as masked language models have them."""
    return [
        {"input_ids": row["input_ids"], "labels": row["labels"].masked_fill(torch.arange(66) % (2 + i) > 0, -100)}
        for i, row in enumerate(packed_rows(4))
    ]


def masked(rank: int, world: int, folder: str) -> Any:
    from transformers import TrainingArguments

    import longctx

    args = TrainingArguments(**arguments(folder, "ddp", max_steps=2))
    trainer = longctx.hf.Trainer(
        model=masked_model(), args=args, train_dataset=masked_rows(), data_collator=collate,
        eval_dataset=masked_rows()[:3], mesh=longctx.Mesh(ring=2),
    )  # fmt: skip
    trainer.train()
    return history(trainer)


def test_a_masked_language_model_keeps_its_labels_in_place(tmp_path: Path) -> None:
    model, rows, losses = masked_model(), masked_rows(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for window in (rows[:2], rows[2:]):
        batch = collate(window)
        logits = model(input_ids=batch["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    for found in run_ranks(2, masked, str(tmp_path)):
        assert found["losses"] == pytest.approx(losses, abs=1e-6)
