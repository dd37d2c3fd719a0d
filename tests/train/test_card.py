"""The model card says what was trained, for what length, and how it is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tiny_run import config, write

from longctx.train.checkpoint.card import model_card
from longctx.train.checkpoint.export import write_card
from longctx.train.checkpoint.manifest import Progress


def described(tmp_path: Path, *overrides: str, **changes: Any) -> str:
    write(tmp_path)
    run = config(tmp_path, *overrides)
    run = run.model_copy(update={"model": run.model.model_copy(update=changes)})
    model = SimpleNamespace(max_position_embeddings=192, rope_parameters={"rope_type": "yarn"})
    return model_card(run, model, Progress(4, 12, 3456))


def test_a_run_from_scratch(tmp_path: Path) -> None:
    text = described(tmp_path)
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "Trained from random weights (llama) by longctx" in text and "4 steps, 3,456 tokens." in text
    assert "| text | `text` |" in text and str(tmp_path) not in text
    assert "| rows | 96 tokens |" in text and "| positions | 192 (RoPE: yarn) |" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code, "card", "exec")
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")' in code


def test_stages_and_adapters(tmp_path: Path) -> None:
    stages = "train.stages=[{sequence_length: 96, steps: 3}, {sequence_length: 192, steps: 3}]"
    unset = ("train.steps=null", "data.sequence_length=null")
    assert "| rows | 96 tokens (from step 1), 192 tokens (from step 4) |" in described(tmp_path, stages, *unset)
    lora = SimpleNamespace(rank=8, export="adapter")
    text = described(tmp_path, pretrained="models/base", lora=lora)
    assert "library_name: peft" in text and "Trained from `base` with LoRA adapters of rank 8 by" in text
    assert 'PeftModel.from_pretrained(base, "path/to/this/folder")' in text
    assert "rank 8, merged here" in described(
        tmp_path, pretrained="models/base", lora=SimpleNamespace(rank=8, export="merged")
    )


def test_a_card_that_is_there_stays(tmp_path: Path) -> None:
    write_card(tmp_path, "first")
    write_card(tmp_path, "second")
    assert (tmp_path / "README.md").read_text() == "first"
