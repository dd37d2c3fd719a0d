"""`model.lora`: what does not fit is told with its key before anything is built."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from config_samples import BASE, load_variant, problems_of, text_of, variant
from pretrained_folders import pretrained_folder

from longctx.config.findings import judge
from longctx.config.load import loads
from longctx.config.pretrained import FOLDER_RULES

FROM_FOLDER: dict[str, Any] = {f"model__{key}": ... for key in BASE["model"] if key != "dtype"}
FROM_FOLDER |= {"data__tokenizer": ..., "data__vocab_size": ...}


def told(**changes: Any) -> list[tuple[str, str]]:
    return [(problem.key, problem.message) for problem in problems_of(text_of(variant(**changes))).problems]


def told_of_folder(folder: Path, lora: dict[str, Any]) -> list[tuple[str, str]]:
    changes = {**FROM_FOLDER, "model__pretrained": str(folder), "model__lora": lora}
    config = loads(text_of(variant(**changes))).config
    return [(finding.key, finding.message) for finding in judge(FOLDER_RULES, config)]


def test_a_model_to_adapt_is_needed() -> None:
    ((key, message),) = told(model__lora={"rank": 8})
    assert key == "model.lora" and message.startswith("needs model.pretrained")


@pytest.mark.parametrize(
    ("lora", "key", "message"),
    [
        ({"alpha": 8}, "model.lora.rank", "is missing; expected a whole number"),
        ({"rank": 8, "lora_alpha": 16}, "model.lora.lora_alpha", "did you mean 'alpha'?"),
        ({"r": 8}, "model.lora.r", "did you mean 'rank'?"),
        ({"rank": 8, "dropout": 1.0}, "model.lora.dropout", "got 1.0; expected a number"),
        ({"rank": 8, "export": "merge"}, "model.lora.export", "did you mean 'merged'?"),
        ({"rank": 8, "targets": ["all-linear", "q_proj"]}, "model.lora.targets", "stands alone"),
    ],
)
def test_keys_of_the_block(tmp_path: Path, lora: dict[str, Any], key: str, message: str) -> None:
    found = told(**FROM_FOLDER, model__pretrained=str(pretrained_folder(tmp_path / "m")), model__lora=lora)
    assert [said for name, said in found if name == key and message in said]


def test_what_adapters_cannot_be_combined_with(tmp_path: Path) -> None:
    folder = str(pretrained_folder(tmp_path / "m"))
    changes = {**FROM_FOLDER, "model__pretrained": folder, "model__lora": {"rank": 8}}
    ((key, _), *_) = told(**changes, attention__layers={"0": "cosine"})
    assert key == "attention.layers"
    nvme = {"zero__stage": 3, "zero__offload_optimizer": "nvme", "zero__nvme_folder": str(tmp_path)}
    ((key, _), *_) = told(**changes, **nvme)
    assert key == "zero.offload_optimizer"


def test_modules_of_the_folder(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path / "m")
    assert told_of_folder(folder, {"rank": 4, "targets": ["q_proj", "mlp.up_proj"], "modules_to_save": "lm_head"}) == []
    lora = {"rank": 4, "targets": ["qproj"], "modules_to_save": ["xyz"]}
    (first, said), (second, listed) = told_of_folder(folder, lora)
    assert (first, second) == ("model.lora.targets", "model.lora.modules_to_save")
    assert said.startswith("got 'qproj'") and said.endswith("did you mean 'q_proj'?")
    assert "their names end in down_proj, embed_tokens" in listed


def test_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    ((key, message),) = told_of_folder(pretrained_folder(tmp_path / "m"), {"rank": 4})
    assert key == "model.lora" and "pip install 'longctx[peft]'" in message


def test_a_dropout_may_change_when_a_run_resumes() -> None:
    from longctx.train.checkpoint.same_run import SettingChange

    old = {"rank": 8, "dropout": 0.0, "export": "merged"}
    assert SettingChange("model.lora", old, {**old, "dropout": 0.1, "export": "adapter"}).remedy is None
    assert SettingChange("model.lora", old, {**old, "rank": 4}).remedy is not None
    assert SettingChange("model.lora", None, old).remedy is not None
    assert load_variant().config.model.lora is None
