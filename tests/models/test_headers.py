"""Weights of a folder by their headers: what is damaged, missing or not there is named, and no tensor is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.zoo import tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from longctx.errors import ModelError
from longctx.models.load.expected import mismatches, tied
from longctx.models.load.headers import read_weights
from longctx.models.load.settings import read_settings

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"
MODELS = ["llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3", "gpt2", "olmo", "olmo2", "phi", "gpt-oss", "qwen2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(tiny_config("llama"), "longctx").save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_has_no_mismatch(name: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(name), "longctx")
    model.save_pretrained(tmp_path)
    weights, settings = read_weights(tmp_path), read_settings(tmp_path)
    assert {key: it.shape for key, it in weights.items()} == {
        key: tuple(value.shape) for key, value in load_file(tmp_path / "model.safetensors").items()
    }
    assert list(mismatches(settings, weights)) == []
    assert tied(settings) == model.config.tie_word_embeddings
    silent = {key: value for key, value in settings.items() if key != "tie_word_embeddings"}
    assert tied(silent) == type(model.config)().tie_word_embeddings
    for key in ("num_key_value_heads", "head_dim") if name in ("mistral", "gemma", "gemma2", "gemma3", "qwen3") else ():
        settings.pop(key)  # a file may leave out what the class has by default
    assert list(mismatches(settings, weights)) == []


def test_a_sharded_folder_is_read_whole(folder: Path) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 1
    weights = read_weights(folder)
    assert weights["model.embed_tokens.weight"].shape == (64, 32) and len({it.file for it in weights.values()}) > 1
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for content, message in (
        (POINTER, "Git LFS pointer"),
        (whole[:-4], "copy it again"),
        (whole + b"0000", "copy it again"),
        (b"", "truncated"),
        (b"\xff" * 100, "truncated"),
        (b"\x05" + bytes(7) + b"[[[[[", "not JSON"),
        (b"\x02" + bytes(7) + b"[]", "damaged"),
    ):
        shard.write_bytes(content)
        with pytest.raises(ModelError, match=message) as caught:
            read_weights(folder)
        assert shard.name in str(caught.value)
    save_file({"other": torch.zeros(1)}, shard)
    with pytest.raises(ModelError, match=f"{shard.name} lacks the weight"):
        read_weights(folder)
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} is missing"):
        read_weights(folder)
    (folder / "model.safetensors.index.json").write_bytes(POINTER)
    with pytest.raises(ModelError, match="Git LFS pointer"):
        read_weights(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 65}, "embed_tokens.weight has 64 rows, but config.json says vocab_size 65"),
        ({"num_hidden_layers": 3}, "config.json says 3 layers, but the weights of layer 2 are not there"),
        ({"num_hidden_layers": 1}, "config.json says 1 layers, but there are weights of layer 1"),
        ({"num_key_value_heads": 1}, "self_attn.k_proj.weight of layer 0 is 16 x 32, but config.json asks for 8 x 32"),
        ({"hidden_size": 48}, "self_attn.q_proj.weight of layer 0"),
        ({"intermediate_size": 48}, "mlp.gate_proj.weight of layer 0"),
        ({"model_type": "gpt2"}, "layer 0 lacks attn.c_attn.weight"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_told(folder: Path, changes: dict[str, Any], message: str) -> None:
    found = list(mismatches(read_settings(folder) | changes, read_weights(folder)))
    assert any(message in text for text in found), found


def test_missing_and_quantised_weights_are_told(folder: Path) -> None:
    settings, weights = read_settings(folder), read_weights(folder)

    def without(*endings: str) -> list[str]:
        return list(mismatches(settings, {key: it for key, it in weights.items() if not key.endswith(endings)}))

    assert without("layers.1.mlp.up_proj.weight") == ["layer 1 lacks mlp.up_proj.weight"]
    assert without("lm_head.weight")[0].startswith("there is no lm_head.weight")
    assert without("embed_tokens.weight")[0].startswith("there is no embedding")
    odd = {**weights, "model.layers.0.mlp.up_proj.weight": weights["lm_head.weight"]._replace(dtype="F8_E4M3")}
    assert "F8_E4M3: quantised" in next(iter(mismatches(settings, odd)))


def test_bounds_of_the_index_are_held(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    for content in ("[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {}}'):
        index.write_text(content)
        with pytest.raises(ModelError, match="no weight_map"):
            read_weights(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(ModelError, match="in the same folder"):
        read_weights(folder)
