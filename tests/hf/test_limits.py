"""What would be wrong on a shard is refused before training starts, by name, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf_tiny import arguments, collate, deepspeed_config, packed_rows, run_ranks, tiny_model

from longctx.errors import EngineError

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "neftune_noise_alpha": ("ddp", {"neftune_noise_alpha": 5.0}, {}),
    "auto_find_batch_size": ("ddp", {"auto_find_batch_size": True}, {}),
    "dispatch_batches": ("ddp", {"accelerator_config": {"dispatch_batches": True}}, {}),
    "sequence_parallel_size": ("ddp", {"deepspeed": deepspeed_config(1) | {"sequence_parallel_size": 2}}, {}),
    "memory.loss_tile with label smoothing": (
        "ddp", {"label_smoothing_factor": 0.1}, {"memory": {"loss_tile": "auto"}},
    ),
    "memory.recompute with gradient_checkpointing": (
        "ddp", {"gradient_checkpointing": True}, {"memory": {"recompute": "layer"}},
    ),
    "batch_rebalance": ("ddp", {"train_sampling_strategy": "batch_rebalance"}, {}),
}  # fmt: skip


def after_an_mpu(rank: int, world: int, folder: str) -> str:
    from deepspeed.utils import groups

    import longctx
    from longctx.patched import patched

    mesh = longctx.Mesh(ring=2).connect()
    CASES["an earlier engine"] = ("zero1", {}, {})
    with patched(groups, mpu=mesh):
        return message(rank, world, folder, "an earlier engine")


def test_an_mpu_of_an_earlier_engine(tmp_path: Path) -> None:
    for found in run_ranks(2, after_an_mpu, str(tmp_path)):
        assert "set deepspeed.utils.groups.mpu = None" in found


def message(rank: int, world: int, folder: str, name: str) -> str:
    from transformers import TrainingArguments

    import longctx

    backend, given, keywords = CASES[name]
    try:
        args = TrainingArguments(**arguments(folder, backend, **given))
        trainer = longctx.hf.Trainer(
            model=tiny_model(), args=args, train_dataset=packed_rows(4), data_collator=collate,
            mesh=longctx.Mesh(ring=2), **keywords,
        )  # fmt: skip
        trainer.train()
    except EngineError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", CASES)
def test_settings_that_would_be_wrong(tmp_path: Path, name: str) -> None:
    for found in run_ranks(2, message, str(tmp_path), name):
        assert name in found
