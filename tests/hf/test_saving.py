"""What longctx.hf saves loads in plain transformers, and a resumed run goes on as if it had not stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tiny import arguments, collate, history, packed_rows, run_ranks, tiny_model


def trained(rank: int, world: int, folder: str, backend: str, ring: int, given: dict[str, Any], resume: bool) -> Any:
    from transformers import TrainingArguments

    import longctx

    given = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear", "max_steps": 4} | given
    args = TrainingArguments(**arguments(folder, backend, **given))
    trainer = longctx.hf.Trainer(
        model=tiny_model(attention_dropout=0.1), args=args, train_dataset=packed_rows(6), data_collator=collate,
        mesh=longctx.Mesh(ring=ring),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(f"{folder}/final")
    return history(trainer)


def final(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def check(folder: Path, ranks: int, backend: str) -> None:
    given = {"save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}
    through = run_ranks(ranks, trained, str(folder), backend, 2, given, False)
    whole = final(folder)
    config = json.loads((folder / "final" / "config.json").read_text())
    assert config["use_cache"] is True and config["architectures"] == ["LlamaForCausalLM"]
    import shutil

    shutil.rmtree(folder / "checkpoint-4")
    again = run_ranks(ranks, trained, str(folder), backend, 2, given, True)
    assert again[0]["losses"] == pytest.approx(through[0]["losses"], abs=1e-6)
    assert again[0]["norms"] == pytest.approx(through[0]["norms"], rel=1e-5)
    for name, weight in final(folder).items():
        assert torch.allclose(weight, whole[name], atol=1e-6), name


def test_resumed_on_a_ring_of_two(tmp_path: Path) -> None:
    check(tmp_path, 2, "zero3")


@pytest.mark.deep
@pytest.mark.parametrize("backend", ["zero0", "zero1", "zero2", "zero3", "ddp", "fsdp2"])
def test_resumed_in_two_replicas(tmp_path: Path, backend: str) -> None:
    check(tmp_path, 4, backend)


def poisoned(rank: int, world: int, folder: str) -> str:
    try:
        trained(rank, world, folder, "zero1", 2, {}, True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Code:
    """Unpickled, it would create a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


@pytest.mark.deep
def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    run_ranks(2, trained, str(tmp_path), "zero1", 2, {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}, False)
    for file in tmp_path.glob("checkpoint-2/global_step2/*.pt"):
        torch.save({"module": Code(str(tmp_path / "ran"))}, file)
    for message in run_ranks(2, poisoned, str(tmp_path)):
        assert "refused" in message
    assert not (tmp_path / "ran").exists()
