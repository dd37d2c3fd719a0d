"""longctx.hf.SFTTrainer trains packed documents as one process does, each document alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tiny import LENGTH, VOCABULARY, arguments, history, packed_rows, reference, run_ranks, tiny_model

pytest.importorskip("trl")


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t1"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", pad_token="t3", unk_token="t1")


def documents() -> list[list[int]]:
    found = []
    for row in packed_rows(8):
        starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), LENGTH]
        found += [row["input_ids"][a:b].tolist() for a, b in zip(starts, starts[1:], strict=False) if b - a > 2]
    return found


def trained(rank: int, world: int, folder: str, backend: str, ring: int, given: dict[str, Any], lora: bool) -> Any:
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig

    import longctx

    disable_progress_bars()
    if lora:
        from peft import LoraConfig

        given = given | {}
    extra = {"peft_config": LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"])} if lora else {}
    common = {"max_length": LENGTH, "gradient_checkpointing": False, "max_steps": 2}
    data = Dataset.from_list([{"input_ids": document} for document in documents()])
    args = SFTConfig(**arguments(folder, backend, **(common | given)))
    trainer = longctx.hf.SFTTrainer(
        model=tiny_model(),
        args=args,
        train_dataset=data,
        processing_class=tokenizer(),
        mesh=longctx.Mesh(ring=ring),
        **extra,
    )
    seen = [len(row["input_ids"]) for row in trainer.train_dataset]
    rows = [row for row in trainer.train_dataset]
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "num_tokens" in entry]
    return {
        "rows": rows,
        "seen": seen,
        "num_tokens": [e["num_tokens"] for e in last],
        **history(trainer),
        "accuracy": [e["mean_token_accuracy"] for e in last],
    }


def as_rows(rows: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """The trainer's packed rows in the form of hf_tiny, of whatever length."""
    found = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        pieces = row.get("seq_lengths") or [len(ids)]
        positions = torch.cat([torch.arange(n) for n in pieces])
        labels = torch.tensor(row["labels"]) if row.get("labels") else ids.clone()
        pad = LENGTH - len(ids)
        found.append(
            {
                "input_ids": torch.nn.functional.pad(ids, (0, pad)),
                "labels": torch.nn.functional.pad(labels.masked_fill(positions == 0, -100), (0, pad), value=-100),
                "position_ids": torch.cat([positions, torch.arange(pad)]),
            }
        )
    return found


@pytest.mark.parametrize("packing", ["bfd"])
def test_packed_documents_on_a_ring_of_two(tmp_path: Path, packing: str) -> None:
    found = run_ranks(2, trained, str(tmp_path), "zero0", 2, {"packing": True, "packing_strategy": packing}, False)
    rows = as_rows(found[0]["rows"])
    losses, norms, _ = reference([rows[:2], rows[2:4]])
    for rank in found:
        assert rank["losses"] == pytest.approx(losses, abs=1e-6)
        assert rank["norms"] == pytest.approx(norms, rel=1e-5)
        assert rank["num_tokens"] == [sum(found[0]["seen"][:2]), sum(found[0]["seen"][:4])]
