"""`model.lora:` adapts a pretrained folder, and names modules that the folder has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from config_samples import FROM_FOLDER, load_variant, refused_by
from safetensors.torch import save_file

from longctx.config import lora_rules
from longctx.config.lora_rules import RULES, lora_modules, lora_package
from longctx.config.schema import RunConfig
from longctx.config.sections.lora import LoraSection

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("random weights", {"model__lora": {"rank": 4}}, "model.lora"),
    (
        "all-linear and another",
        {**FROM_FOLDER, "model__pretrained": "f", "model__lora": {"rank": 4, "targets": ["all-linear", "q_proj"]}},
        "model.lora.targets",
    ),
]


@pytest.mark.parametrize(("what", "changes", "key"), CASES, ids=[case[0] for case in CASES])
def test_what_lora_cannot_adapt_is_refused(what: str, changes: dict[str, Any], key: str) -> None:
    assert key in refused_by(RULES, changes)


def adapted(folder: Path, **lora: Any) -> RunConfig:
    config = load_variant().config
    model = config.model.model_copy(update={"pretrained": str(folder), "lora": LoraSection(**{"rank": 4, **lora})})
    return config.model_copy(update={"model": model})


def test_modules_are_those_of_the_folder(tmp_path: Path) -> None:
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.embed_tokens")
    save_file({f"{name}.weight": torch.zeros(2, 2) for name in names}, tmp_path / "model.safetensors")
    right = adapted(tmp_path, targets=["q_proj", "mlp.down_proj"], modules_to_save=["embed_tokens", "lm_head"])
    assert list(lora_modules(right)) == []
    wrong = adapted(tmp_path, targets=["q_pro"], modules_to_save=["score"])
    first, second = lora_modules(wrong)
    assert (first.key, second.key) == ("model.lora.targets", "model.lora.modules_to_save")
    assert "got 'q_pro'" in first.message and "did you mean 'q_proj'?" in first.message
    assert "embed_tokens" in second.message


def test_peft_is_needed_only_for_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_rules.importlib.util, "find_spec", lambda name: None)
    assert list(lora_package(load_variant().config)) == []
    (said,) = lora_package(adapted(tmp_path, rank=4))
    assert said.key == "model.lora" and "pip install 'longctx[peft]'" in said.message
