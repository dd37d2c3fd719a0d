"""longctx.hf.ring(DPOTrainer): sharded pairs give the loss and gradient of TRL's own trainer in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tiny import VOCABULARY, arguments, run_ranks, tiny_model, tokenizer, words


def pairs() -> list[dict[str, str]]:
    generator = torch.Generator().manual_seed(5)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return words(torch.randint(4, VOCABULARY, (length,), generator=generator).tolist())

    return [{"prompt": text(5, 20), "chosen": text(5, 30), "rejected": text(5, 30)} for _ in range(8)]


def trained(rank: int, world: int, folder: str, backend: str, ring: int, kind: str, given: dict[str, Any]) -> Any:
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    import longctx

    disable_progress_bars()
    common = {"max_steps": 2, "gradient_checkpointing": False, "learning_rate": 0.05, "max_length": 64}
    args = DPOConfig(**arguments(folder, backend, **(common | given)))
    keywords: dict[str, Any] = {"mesh": longctx.Mesh(ring=ring)} if ring else {}
    if kind == "lora":
        from peft import LoraConfig

        keywords["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    else:
        torch.manual_seed(1)
        reference = tiny_model()
        for parameter in reference.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape)
        keywords["ref_model"] = reference
    data = Dataset.from_list(pairs())
    kind_of_trainer = longctx.hf.ring(DPOTrainer) if ring else DPOTrainer
    trainer = kind_of_trainer(
        model=tiny_model(), args=args, train_dataset=data, eval_dataset=data.select(range(3)),
        processing_class=tokenizer(), **keywords,
    )  # fmt: skip
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy", "num_tokens", "mean_token_accuracy")
    found = {name: [entry[name] for entry in entries] for name in names}
    return found | {"eval_loss": trainer.evaluate()["eval_loss"]}


def check(found: list[Any], expected: dict[str, Any]) -> None:
    for rank in found:
        for name, values in expected.items():
            assert rank[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name


DEEP = [pytest.param(backend, marks=pytest.mark.deep) for backend in ("zero0", "zero2", "zero3", "fsdp2")]


@pytest.mark.parametrize("backend", ["ddp", *DEEP])
def test_pairs_on_a_ring_of_two(tmp_path: Path, backend: str) -> None:
    (expected,) = run_ranks(1, trained, str(tmp_path), "ddp", 0, "", {})
    check(run_ranks(2, trained, str(tmp_path), backend, 2, "", {}), expected)


@pytest.mark.deep
def test_two_replicas(tmp_path: Path) -> None:
    (expected,) = run_ranks(1, trained, str(tmp_path), "ddp", 0, "", {"gradient_accumulation_steps": 4})
    del expected["mean_token_accuracy"], expected["entropy"]  # TRL's means of each micro-batch's means
    check(run_ranks(4, trained, str(tmp_path), "ddp", 2, "", {}), expected)


@pytest.mark.deep
@pytest.mark.parametrize("losses", ["ipo", "sft"])
def test_lora_and_other_losses(tmp_path: Path, losses: str) -> None:
    given = {"loss_type": [losses]}
    (expected,) = run_ranks(1, trained, str(tmp_path), "ddp", 0, "lora", given)
    check(run_ranks(2, trained, str(tmp_path), "ddp", 2, "lora", given), expected)
