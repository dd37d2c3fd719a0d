"""read_config and transformers' AutoConfig read the same configuration out of one config.json, whatever its class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from longctx.errors import ModelError
from longctx.models.load.pretrained import read_config
from longctx.models.load.read_keys import accepted_keys

# Image models whose configuration names a backbone to download, or an attention implementation to take.
REFUSED = {
    "conditional_detr", "dab-detr", "deformable_detr", "detr", "lightglue", "maskformer", "omdet-turbo",
    "table-transformer",
}  # fmt: skip
# transformers' own reader refuses what its default configuration saves.
BROKEN = {"gemma4_assistant", "nougat"}
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}


def written(folder: Path, settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def assert_same(folder: Path) -> None:
    """The two readers agree: the same class and values, or both refuse."""
    try:
        expected = AutoConfig.from_pretrained(folder)
    except Exception:  # transformers' validators raise many kinds
        with pytest.raises(ModelError):
            read_config(folder)
        return
    found = read_config(folder)
    assert type(found) is type(expected)
    theirs, ours = expected.to_dict(), found.to_dict()
    for values in (theirs, ours):
        values.pop("_name_or_path", None)
    written_ours, written_theirs = (json.dumps(values, sort_keys=True, default=str) for values in (ours, theirs))
    assert written_ours == written_theirs  # as text: NaN is not equal to itself


def variants(settings: dict[str, Any], config_class: Any) -> dict[str, dict[str, Any]]:
    """What a class saves, with sizes doubled, and under the standard names that its own names stand for."""
    doubled = {
        key: 2 * value if type(value) is int and 8 <= value < 4096 and "token" not in key else value
        for key, value in settings.items()
    }
    renamed = dict(doubled)
    for standard, own in config_class.attribute_map.items():
        if own in renamed and "." not in own:
            renamed[standard] = renamed.pop(own)
    return {"saved": settings, "doubled": doubled, "renamed": renamed}


@pytest.mark.deep
def test_every_configuration_of_transformers_is_read_as_autoconfig_reads_it(tmp_path: Path) -> None:
    seen = 0
    for kind in CONFIG_MAPPING_NAMES:
        if kind in BROKEN | REFUSED:
            continue
        try:
            config_class = CONFIG_MAPPING[kind]
            config_class().save_pretrained(tmp_path / kind)
        except ImportError:  # needs a package of image models
            continue
        settings = json.loads((tmp_path / kind / "config.json").read_text())
        for name, changed in variants(settings, config_class).items():
            try:
                assert_same(written(tmp_path / kind / name, changed))
            except (AssertionError, ModelError) as problem:
                raise AssertionError(f"{kind}, {name}: {problem}") from problem
        seen += 1
    assert seen > 700


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_is_refused_is_refused_for_safety(kind: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'backbone' names a model|'attn_implementation' chooses"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
        {"torch_dtype": "bfloat16"},
        {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16},
        {"model_type": "qwen3_moe", "num_local_experts": 6, "num_experts_per_tok": 2},
        {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2},
        {"model_type": "mixtral", "num_experts": 4},
        {"model_type": "gpt2", "hidden_size": 96, "n_positions": 77},
        {"model_type": "gemma3", "text_config": {**LLAMA, "model_type": "gemma3_text"}, "vision_config": {}},
        {"model_type": "gemma4_text", "per_layer_config": {"1": {"head_dim": 32}}},
        {"model_type": "qwen2_vl", "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
    ],
)
def test_older_and_nested_keys(changes: dict[str, Any], tmp_path: Path) -> None:
    assert_same(written(tmp_path, LLAMA | changes))


def test_names_of_methods_and_unknown_names_are_no_keys() -> None:
    keys = accepted_keys(CONFIG_MAPPING["llama"])
    assert {"hidden_size", "rope_theta", "num_labels"} <= keys
    assert not {"from_dict", "to_dict", "hub_kernel", "forward", "__class__", "_attn_implementation_internal"} & keys


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9}, {"num_labels": 10**9}, {"vocab_size": 2**31}, {"num_attention_heads": 10**6},
        {"text_config": {"num_hidden_layers": 10**9}}, {"num_local_experts": 10**9}, {"hidden_size": 2**40},
    ],
)  # fmt: skip
def test_sizes_that_no_model_has_are_refused_before_anything_is_allocated(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"which no model has"):
        read_config(written(tmp_path, LLAMA | changes))
