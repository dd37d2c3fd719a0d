"""longctx.hf.SFTTrainer trains packed documents as one process does, each document alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tiny import (
    LENGTH,
    arguments,
    dense_loss,
    history,
    packed_rows,
    reference,
    run_ranks,
    tiny_model,
    tokenizer,
    words,
)


def documents() -> list[list[int]]:
    found = []
    for row in packed_rows(14):
        starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), LENGTH]
        found += [row["input_ids"][a:b].tolist() for a, b in zip(starts, starts[1:], strict=False) if b - a > 2]
    return found


def trained(rank: int, world: int, folder: str, backend: str, ring: int, kind: str, given: dict[str, Any]) -> Any:
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig

    import longctx

    disable_progress_bars()
    extra = {}
    if "lora" in kind:
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    samples: list[Any] = [{"input_ids": document} for document in documents()]
    if "completion" in kind:
        samples = [{"prompt": words(d[: len(d) // 2]), "completion": words(d[len(d) // 2 :])} for d in documents()]
    if "assistant" in kind:
        samples = [
            {
                "messages": [
                    {"role": role, "content": words(part)}
                    for role, part in (("user", d[: len(d) // 2]), ("assistant", d[len(d) // 2 :]))
                ]
            }
            for d in documents()
        ]
    common = {"max_length": LENGTH, "gradient_checkpointing": False, "max_steps": 2}
    args = SFTConfig(**arguments(folder, backend, **(common | given)))
    trainer = longctx.hf.SFTTrainer(
        model=tiny_model(), args=args, train_dataset=Dataset.from_list(samples), processing_class=tokenizer(),
        eval_dataset=Dataset.from_list(samples[:3]), mesh=longctx.Mesh(ring=ring), **extra,
    )  # fmt: skip
    rows = list(trainer.train_dataset)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()} if extra else None
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {name: [entry[name] for entry in entries] for name in ("num_tokens", "mean_token_accuracy")}
    return {"rows": rows, "evaluation": trainer.evaluate(), "start": start, **found, **history(trainer)}


def as_rows(rows: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """The trainer's rows in the form of hf_tiny: filled up with a document that has no labels."""
    found = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        positions = torch.cat([torch.arange(n) for n in row.get("seq_lengths") or [len(ids)]])
        labels = torch.tensor(row["labels"]) if row.get("labels") else ids.clone()
        rest = LENGTH - len(ids)
        pad = torch.nn.functional.pad
        found.append({
            "input_ids": pad(ids, (0, rest)),
            "labels": pad(labels.masked_fill(positions == 0, -100), (0, rest), value=-100),
            "position_ids": torch.cat([positions, torch.arange(rest)]),
        })  # fmt: skip
    return found


def check(found: list[Any], rows_per_step: int, model: Any = None, smoothing: float = 0.0) -> None:
    rows = as_rows(found[0]["rows"])
    windows = [rows[:rows_per_step], rows[rows_per_step : 2 * rows_per_step]]
    losses, norms, trained = reference(windows, model=model, smoothing=smoothing)
    for rank in found:
        assert rank["losses"] == pytest.approx(losses, abs=1e-6)
        assert rank["norms"] == pytest.approx(norms, rel=1e-5)
        lengths = [len(row["input_ids"]) for row in found[0]["rows"]]
        assert rank["num_tokens"] == [sum(lengths[:rows_per_step]), sum(lengths[: 2 * rows_per_step])]


def test_packed_documents_on_a_ring_of_two(tmp_path: Path) -> None:
    found = run_ranks(2, trained, str(tmp_path), "zero0", 2, "", {"packing": True, "packing_strategy": "bfd"})
    check(found, 2)
    rows = as_rows(found[0]["rows"])
    _, _, model = reference([rows[:2], rows[2:4]])
    with torch.no_grad():
        total, count = dense_loss(model, as_rows([{"input_ids": document} for document in documents()[:3]]))
    assert found[0]["evaluation"]["eval_loss"] == pytest.approx(float(total) / count, abs=1e-5)


CASES: dict[str, tuple[int, str, str, dict[str, Any]]] = {
    "bfd, zero3, two replicas": (4, "zero3", "", {"packing": True}),
    "bfd_split": (2, "zero2", "", {"packing": True, "packing_strategy": "bfd_split"}),
    "wrapped": (2, "ddp", "", {"packing": True, "packing_strategy": "wrapped"}),
    "unpacked": (2, "ddp", "", {}),
    "padding-free": (2, "ddp", "", {"padding_free": True, "max_length": None}),
    "unpacked, two rows": (2, "zero1", "", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}),
    "assistant only, packed": (2, "ddp", "assistant", {"packing": True, "assistant_only_loss": True}),
    "completion only": (2, "ddp", "completion", {}),
    "completion only, packed": (4, "fsdp2", "completion", {"packing": True}),
    "packed, fsdp2": (2, "fsdp2", "", {"packing": True}),
    "label smoothing": (2, "ddp", "", {"packing": True, "label_smoothing_factor": 0.1}),
    "checkpointing": (2, "ddp", "", {"packing": True, "gradient_checkpointing": True}),
}


@pytest.mark.deep
@pytest.mark.parametrize("name", CASES)
def test_kinds_of_data_and_settings(tmp_path: Path, name: str) -> None:
    ranks, backend, kind, given = CASES[name]
    found = run_ranks(ranks, trained, str(tmp_path), backend, 2, kind, given)
    check(found, 2 * ranks // 2, smoothing=given.get("label_smoothing_factor", 0.0))


@pytest.mark.deep
@pytest.mark.parametrize("backend", ["zero0", "zero3", "ddp"])
def test_lora(tmp_path: Path, backend: str) -> None:
    found = run_ranks(2, trained, str(tmp_path), backend, 2, "lora", {"packing": True})
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(42)
    model = tiny_model()
    torch.manual_seed(42)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    if backend != "zero3":
        model.load_state_dict(found[0]["start"])
    check(found, 2, model)
