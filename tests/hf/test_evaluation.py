"""Evaluation and prediction of longctx.hf: the mean over all tokens, each row counted once, and whole logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_tiny import LENGTH, arguments, collate, dense_loss, packed_rows, run_ranks, tiny_model

ROWS = 5  # not a multiple of replicas x rows per batch


def evaluated(rank: int, world: int, folder: str, backend: str, ring: int, kind: str, first: bool) -> dict[str, Any]:
    from transformers import TrainingArguments

    import longctx

    seen: dict[str, Any] = {}

    def metrics(result: Any) -> dict[str, float]:
        seen["logits"], seen["labels"] = result.predictions, result.label_ids
        return {"rows": float(len(result.label_ids))}

    def top(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert logits.shape[:2] == labels.shape
        return logits.argmax(-1)

    args = TrainingArguments(
        **arguments(
            folder,
            backend,
            prediction_loss_only=kind == "loss",
            per_device_eval_batch_size=2,
            max_steps=1,
            learning_rate=0.0,
        )
    )
    trainer = longctx.hf.Trainer(
        model=tiny_model(), args=args, train_dataset=packed_rows(8), eval_dataset=packed_rows(ROWS),
        data_collator=collate, mesh=longctx.Mesh(ring=ring), compute_metrics=None if kind == "loss" else metrics,
        preprocess_logits_for_metrics=top if kind == "top" else None,
    )  # fmt: skip
    if first:  # an evaluation before training must leave training right
        trainer.evaluate()
    trainer.train()  # with a learning rate of 0
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {"losses": losses, "metrics": trainer.evaluate(), **seen}
    if kind == "predict":
        result = trainer.predict(packed_rows(ROWS))
        found |= {"predictions": result.predictions, "labels": result.label_ids, "test": result.metrics}
    return found


def expected() -> tuple[float, np.ndarray]:
    rows, model = packed_rows(ROWS), tiny_model()
    with torch.no_grad():
        total, count = dense_loss(model, rows)
        logits = np.zeros((ROWS, LENGTH, 97), dtype=np.float32)
        for index, row in enumerate(rows):
            starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), LENGTH]
            for a, b in zip(starts, starts[1:], strict=False):
                logits[index, a:b] = model(input_ids=row["input_ids"][None, a:b]).logits[0].numpy()
    return float(total) / count, logits


def check(found: dict[str, Any], kind: str) -> None:
    loss, logits = expected()
    assert found["metrics"]["eval_loss"] == pytest.approx(loss, abs=1e-6)
    if kind == "loss":
        return
    labels = np.stack([row["labels"].numpy() for row in packed_rows(ROWS)])
    assert found["metrics"]["eval_rows"] == ROWS
    assert np.array_equal(found["labels"], labels)
    if kind == "top":
        assert np.array_equal(found["logits"], logits.argmax(-1))
    else:
        assert np.abs(found["logits"] - logits).max() < 1e-5
    if kind == "predict":
        assert np.abs(found["predictions"] - logits).max() < 1e-5
        assert found["test"]["test_loss"] == pytest.approx(loss, abs=1e-6)
        total, count = dense_loss(tiny_model(), packed_rows(8)[: found["rows"]])
        assert found["losses"] == pytest.approx([float(total.detach()) / count], abs=1e-6)


@pytest.mark.parametrize("kind", ["loss", "predict"])
def test_on_a_ring_of_two(tmp_path: Path, kind: str) -> None:
    for found in run_ranks(2, evaluated, str(tmp_path), "ddp", 2, kind, True):
        check(found | {"rows": 2}, kind)


@pytest.mark.deep
@pytest.mark.parametrize("backend", ["zero0", "zero1", "zero2", "zero3", "ddp", "fsdp2"])
def test_on_a_ring_in_each_of_two_replicas(tmp_path: Path, backend: str) -> None:
    for found in run_ranks(4, evaluated, str(tmp_path), backend, 2, "predict", backend == "ddp"):
        check(found | {"rows": 4}, "predict")


@pytest.mark.deep
@pytest.mark.parametrize("kind", ["top", "loss"])
def test_replicas_without_a_ring(tmp_path: Path, kind: str) -> None:
    for found in run_ranks(2, evaluated, str(tmp_path), "zero2", 1, kind, False):
        check(found | {"rows": 4}, kind)
