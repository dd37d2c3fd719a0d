"""A folder from a stranger: keys of config.json are data or refused, weights are safetensors, nothing is fetched."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from models.zoo import tiny_config, tiny_model

from longctx.errors import ModelError
from longctx.models.load.headers import weight_files
from longctx.models.load.pretrained import load_pretrained, make_model, read_config
from longctx.models.load.scratch import make_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(tiny_config("llama"), "longctx").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"a connection was attempted: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_load_gives_the_saved_weights_bitwise(name: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(name), "longctx")
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    assert again.config._attn_implementation == "longctx"
    assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    for key in ("rope_parameters", "sliding_window", "layer_types", "num_key_value_heads"):
        assert getattr(model.config, key, None) == getattr(again.config, key, None)
    assert load_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_attn_implementation_internal": "someone/kernel"}, "_attn_implementation_internal"),
        ({"_experts_implementation_internal": "someone/kernel"}, "_experts_implementation_internal"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map.*code"),
        ({"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}}, "auto_map.*code"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"model_type": "evil"}, "model_type 'evil'"),
        ({"model_type": None}, "model_type"),
        ({"num_attention_heads": "many"}, "transformers rejects"),
    ],
)
def test_dangerous_and_broken_configs_are_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    edit(folder, **change)
    with pytest.raises(ModelError, match=message):
        load_pretrained(folder)


def test_undeclared_keys_never_reach_the_config(folder: Path) -> None:
    edit(folder, forward="boom", hub_kernel="someone/kernel", use_cache=False)
    config = read_config(folder)
    assert not hasattr(config, "forward") and not hasattr(config, "hub_kernel")
    assert load_pretrained(folder).config.use_cache is False


def test_folders_without_safe_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter"):
        load_pretrained(folder)
    (folder / "adapter_config.json").unlink()
    cut = weights.read_bytes()[:-100]
    weights.write_bytes(cut)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_pretrained(folder)
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pytorch_model.bin may run code"):
        load_pretrained(folder)
    for name in ("../x.safetensors", "x.bin", "missing.safetensors"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ModelError, match=name.replace(".", r"\.")):
            weight_files(folder)
    with pytest.raises(ModelError, match="no config.json"):
        load_pretrained(tmp_path / "nowhere")


def test_missing_weights_are_named(folder: Path) -> None:
    edit(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lacks \d+ weights.*layers\.2"):
        load_pretrained(folder)


def test_config_from_sizes_names_what_is_wrong() -> None:
    for arguments, message in (
        (dict(architecture="lama"), "did you mean 'llama'"),
        (dict(architecture="llama", heads=6, kv_heads=4), "kv_heads=4"),
        (dict(architecture="llama", heads=6, hidden_size=32), "hidden_size=32 is not a multiple of heads=6"),
        (dict(architecture="gpt2", heads=4, kv_heads=2), "no grouped-query attention"),
        (dict(architecture="llama", extra={"rope_parametres": {}}), "did you mean 'rope_parameters'"),
        (dict(architecture="qwen2", hidden_size=64, heads=4, head_dim=32), "no head_dim of its own"),
    ):
        with pytest.raises(ModelError, match=message):
            make_config(**arguments)  # type: ignore[arg-type]
    config = make_config(
        "gpt2", hidden_size=48, layers=3, heads=4, max_positions=99, vocab_size=50, tie_embeddings=True
    )
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions, config.n_inner) == (48, 3, 4, 99, 192)
    assert config.attn_pdrop == 0.0 and config.tie_word_embeddings
    model = make_model(make_config("llama", hidden_size=48, layers=1, heads=4, vocab_size=50), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.config.intermediate_size == 128
    assert model.config._attn_implementation == "longctx"


@pytest.mark.parametrize(
    "base",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": None, "rope_theta": 5e5},
        {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ],
)
def test_changed_keys_reach_the_model_and_what_it_saves(folder: Path, tmp_path: Path, base: dict[str, Any]) -> None:
    edit(folder, **base)
    scaled = {"rope_type": "linear", "factor": 2.0}
    config = read_config(folder, {"max_position_embeddings": 9999, "rope_parameters": scaled})
    assert config.rope_parameters == {**scaled, "rope_theta": 5e5} and config.max_position_embeddings == 9999
    model = load_pretrained(folder, config=config)
    model.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again").max_position_embeddings == 9999
    assert read_config(tmp_path / "again").rope_parameters == {**scaled, "rope_theta": 5e5}
