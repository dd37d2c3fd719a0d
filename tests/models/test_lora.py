"""Adapters on a model: what is trained, what merging gives, and what an adapter's folder holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models.zoo import tiny_config, tiny_model
from safetensors.torch import load_file

from longctx.errors import MissingPackageError, ModelError
from longctx.models.lora import adapter_config, add_adapters, merged, save_adapter


def adapted(**changes: Any) -> Any:
    torch.manual_seed(2)
    settings = {"rank": 4, "alpha": 8.0, "targets": ("q_proj", "up_proj"), **changes}
    return add_adapters(tiny_model(tiny_config("llama"), "sdpa"), adapter_config(**settings), "models/base")


def trained_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: torch.randn_like(p) / 8 for name, p in model.named_parameters() if p.requires_grad}


def test_merged_weights_are_w_plus_alpha_over_r_times_b_a() -> None:
    for changes, scale in (({}, 2.0), ({"rslora": True}, 4.0)):
        model = adapted(**changes)
        weights = trained_of(model)
        assert {name.split(".")[-4] for name in weights} == {"q_proj", "up_proj"}
        name = "base_model.model.model.layers.1.self_attn.q_proj"
        before = dict(model.named_parameters())[f"{name}.base_layer.weight"].clone()
        a, b = weights[f"{name}.lora_A.default.weight"], weights[f"{name}.lora_B.default.weight"]
        inner = merged(model, weights)
        torch.testing.assert_close(inner.model.layers[1].self_attn.q_proj.weight, before + scale * b @ a)
        assert "lora" not in " ".join(inner.state_dict())


def test_an_adapter_folder_holds_the_adapter_alone(tmp_path: Path) -> None:
    model = adapted(modules_to_save=("lm_head",))
    weights = trained_of(model)
    save_adapter(model, weights, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert len(names) == 2 * 2 * 2 + 1 and "base_model.model.lm_head.weight" in names


def test_a_target_that_does_not_exist() -> None:
    with pytest.raises(ModelError, match="model.lora: PEFT rejects it for LlamaForCausalLM"):
        adapted(targets=("qqq",))
    with pytest.raises(ModelError, match="weights that the model lacks, first x"):
        merged(adapted(), {"x": torch.zeros(1)})


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'longctx\[peft\]'"):
        adapter_config(4, 8.0)
