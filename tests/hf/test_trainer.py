"""longctx.hf.Trainer trains as one process does on the definition: each document alone, the mean over all tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf_tiny import arguments, collate, history, packed_rows, reference, run_ranks, tiny_model, windows_of

STEPS = 3


def trained(rank: int, world: int, folder: str, backend: str, ring: int, given: dict[str, Any]) -> dict[str, Any]:
    from transformers import TrainingArguments

    import longctx

    args = TrainingArguments(**arguments(folder, backend, **given))
    trainer = longctx.hf.Trainer(
        model=tiny_model(),
        args=args,
        train_dataset=packed_rows(12),
        data_collator=collate,
        mesh=longctx.Mesh(ring=ring),
    )
    trainer.train()
    return history(trainer)


def check(found: list[dict[str, Any]], expected: Any) -> None:
    losses, norms, _ = expected
    for rank in found:
        assert rank["losses"] == pytest.approx(losses, abs=1e-6)
        assert rank["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("backend", ["zero0", "zero3", "ddp"])
def test_a_ring_of_two_trains_as_one_process(tmp_path: Path, backend: str) -> None:
    found = run_ranks(2, trained, str(tmp_path), backend, 2, {})
    check(found, reference(windows_of(packed_rows(12), STEPS, 2)))


@pytest.mark.deep
@pytest.mark.parametrize("backend", ["zero0", "zero1", "zero2", "zero3", "ddp", "fsdp2"])
def test_a_ring_in_each_of_two_replicas(tmp_path: Path, backend: str) -> None:
    found = run_ranks(4, trained, str(tmp_path), backend, 2, {})
    check(found, reference(windows_of(packed_rows(12), STEPS, 4)))
