"""`model:`: a source, sizes that fit together, and no keyword that another key owns."""

from __future__ import annotations

from typing import Any

import pytest
from config_samples import BASE, FROM_FOLDER, load_variant, refused_by

from longctx.config.model_rules import RULES

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("no model", {f"model__{key}": ... for key in BASE["model"]}, "model"),
    ("folder and sizes", {"model__pretrained": "m"}, "model.hidden_size"),
    ("heads do not divide hidden", {"model__heads": 5, "model__kv_heads": 5}, "model.heads"),
    ("kv heads do not divide heads", {"model__kv_heads": 3}, "model.kv_heads"),
    ("odd head", {"model__head_dim": 15}, "model.head_dim"),
    ("gpt2 with grouped heads", {"model__architecture": "gpt2"}, "model.kv_heads"),
    ("olmo with free heads", {"model__architecture": "olmo", "model__head_dim": 32}, "model.head_dim"),
    ("own keyword in extra", {"model__extra": {"hidden_size": 3}}, "model.extra.hidden_size"),
    ("remote code in extra", {"model__extra": {"auto_map": {"a": "b"}}}, "model.extra.auto_map"),
    ("attention in extra", {"model__extra": {"_attn_implementation": "x"}}, "model.extra._attn_implementation"),
]


@pytest.mark.parametrize(("changes", "key"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_broken_rules_are_refused_by_key(changes: dict[str, Any], key: str) -> None:
    assert key in refused_by(RULES, changes)


@pytest.mark.parametrize(
    "architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "olmo", "olmo2"]
)
def test_every_architecture_with_grouped_heads_passes(architecture: str) -> None:
    assert load_variant(model__architecture=architecture).config.model.architecture == architecture


@pytest.mark.parametrize("name", ["hidden_size", "layers", "heads"])
def test_each_missing_size_is_named(name: str) -> None:
    assert refused_by(RULES, {f"model__{name}": ...}) == {f"model.{name}"}


def test_a_folder_leaves_only_rope_to_the_user() -> None:
    extra = {"rope_parameters": {"rope_type": "default"}, "rms_norm_eps": 1e-5}
    assert refused_by(RULES, {**FROM_FOLDER, "model__pretrained": "m", "model__extra": extra}) == {
        "model.extra.rms_norm_eps"
    }
