"""The blocks of docs/huggingface.md run on two ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tiny import arguments, collate, dense_loss, packed_rows, run_ranks, tiny_model, tokenizer
from house_files import ROOT

UNNEEDED = ("output_dir", "gradient_accumulation_steps", "max_steps")


def page(rank: int, world: int, folder: str) -> float:
    from datasets import Dataset

    documents = [{"input_ids": row["input_ids"].tolist()} for row in packed_rows(6)]
    names: dict[str, Any] = {
        "model": tiny_model(), "rows": packed_rows(8), "held_out": packed_rows(3), "collate": collate,
        "documents": Dataset.from_list(documents), "tokenizer": tokenizer(), "folder": folder,
    }  # fmt: skip
    given = {key: value for key, value in arguments(folder, "ddp").items() if key not in UNNEEDED}
    names["more"] = given | {"learning_rate": 0.0}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "huggingface.md").read_text(), re.DOTALL):
        exec(compile(block, "docs/huggingface.md", "exec"), names)  # noqa: S102
        losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
        assert losses
        names["more"] = names["more"] | {"gradient_checkpointing": False}
        if "evaluate" in block:
            found = names["trainer"].evaluate()["eval_loss"]
    return float(found)


def test_the_page_runs(tmp_path: Path) -> None:
    with torch.no_grad():
        total, count = dense_loss(tiny_model(), packed_rows(3))
    for found in run_ranks(2, page, str(tmp_path)):
        assert found == pytest.approx(float(total) / count, abs=1e-6)
    assert (tmp_path / "model.safetensors").is_file()
