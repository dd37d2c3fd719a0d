"""How many weights `model.lora` trains, by the folder's headers and by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_samples import BASE, load_variant
from pretrained_folders import pretrained_folder

from longctx.config.lora import trained_parameters
from longctx.config.machine import disk_needed

FROM_FOLDER: dict[str, Any] = {f"model__{key}": ... for key in BASE["model"] if key != "dtype"}
FROM_FOLDER |= {"data__tokenizer": ..., "data__vocab_size": ...}


@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 4},
        {"rank": 2, "targets": ["q_proj", "down_proj"]},
        {"rank": 2, "targets": "v_proj", "modules_to_save": ["lm_head"]},
    ],
)
def test_trained_weights_are_those_of_peft(tmp_path: Path, lora: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    from longctx.train.model import adapted

    folder = pretrained_folder(tmp_path / "model")
    config = load_variant(**FROM_FOLDER, model__pretrained=str(folder), model__lora=lora).config
    model = adapted(AutoModelForCausalLM.from_pretrained(folder), config)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained_parameters(config) == count
    needed = disk_needed(config)
    assert needed is not None and needed == 12 * count * (config.checkpoint.keep + 1)


def test_without_adapters_nothing_is_counted() -> None:
    assert trained_parameters(load_variant().config) is None
