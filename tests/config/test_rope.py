"""`model.rope`: what is filled in, and what transformers makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from config_samples import load_variant, variant
from config_samples import text_of as text
from house_files import ROOT
from pretrained_folders import pretrained_folder

from longctx.config.architecture import pretrained_changes, transformers_keywords
from longctx.config.load import loads
from longctx.config.rope import resolve
from longctx.config.write import dump
from longctx.models.load.pretrained import read_config
from longctx.train.model import model_config

FROM_FOLDER: dict[str, Any] = {f"model__{key}": ... for key in ("architecture", "hidden_size", "layers", "heads")}
FROM_FOLDER |= {"model__kv_heads": ..., "data__tokenizer": ..., "data__vocab_size": ...}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
# block -> (rope_parameters, max_position_embeddings) for a folder of 2048 positions and rows of 8192
CASES: list[tuple[dict[str, Any], dict[str, Any], int]] = [
    ({"rope_type": "linear"}, {"factor": 4.0}, 8192),
    ({"rope_type": "linear", "factor": 8}, {"factor": 8.0}, 16384),
    ({"rope_type": "default", "rope_theta": 5e6}, {"rope_theta": 5e6}, 8192),
    ({"rope_type": "dynamic", "factor": 2}, {"factor": 2.0}, 2048),
    ({"rope_type": "yarn"}, {"factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
    (
        {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": "1Ki", "beta_fast": 16},
        {"factor": 8.0, "original_max_position_embeddings": 1024, "beta_fast": 16.0},
        8192,
    ),
    (
        {"rope_type": "llama3"},
        {
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        8192,
    ),
    ({"rope_type": "longrope", **LONG}, {"factor": 4.0, "original_max_position_embeddings": 2048, **LONG}, 8192),
]


def of_folder(folder: Path, rope: dict[str, Any], **more: Any) -> Any:
    changes = {"model__pretrained": str(folder), "model__rope": rope, "data__sequence_length": 8192, **more}
    return loads(text(variant(**FROM_FOLDER, **changes))).config


@pytest.mark.parametrize(("block", "parameters", "positions"), CASES)
def test_a_folder_is_extended_as_transformers_would(
    tmp_path: Path, block: dict[str, Any], parameters: dict[str, Any], positions: int
) -> None:
    folder = pretrained_folder(tmp_path / "m", max_position_embeddings=2048, rope_theta=1e6)
    config = of_folder(folder, block)
    found = read_config(folder, pretrained_changes(config))
    assert found.rope_parameters == {"rope_theta": 1e6, "rope_type": block["rope_type"], **parameters}
    assert found.max_position_embeddings == positions
    assert loads(dump(config)).config == config
    assert model_config(config, 300, None).to_dict() == found.to_dict()


def test_frequencies_and_logits_are_those_of_transformers(tmp_path: Path) -> None:
    """The same config.json, read by plain transformers."""
    import torch
    from models.zoo import tiny_config, tiny_model
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "model"
    tiny_model(tiny_config("llama", max_position_embeddings=16), "eager").save_pretrained(folder)
    for block, _, _ in CASES:
        config = of_folder(folder, block)
        ours = read_config(folder, pretrained_changes(config))
        ours.save_pretrained(tmp_path / "again")
        theirs = AutoConfig.from_pretrained(tmp_path / "again")
        assert theirs.rope_parameters == ours.rope_parameters
        tokens = torch.arange(40)[None]
        made = [
            AutoModelForCausalLM.from_pretrained(folder, config=one, attn_implementation=kind, dtype=torch.float64)
            for one, kind in ((ours, "longctx"), (theirs, "eager"))
        ]
        with torch.no_grad():
            logits = [model(tokens, use_cache=False).logits for model in made]
        assert torch.equal(made[0].model.rotary_emb.inv_freq, made[1].model.rotary_emb.inv_freq)
        assert (logits[0] - logits[1]).abs().max() < 1e-6


def test_a_scaled_folder_is_extended_further(tmp_path: Path) -> None:
    old = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old |= {"original_max_position_embeddings": 1024, "rope_theta": 5e5}
    folder = pretrained_folder(tmp_path / "m", max_position_embeddings=2048, rope_parameters=old)
    found = resolve(of_folder(folder, {"rope_type": "llama3"}))
    assert found is not None and found.parameters == {**old, "factor": 8.0} and found.positions == 8192


def test_only_layers_that_see_the_whole_row_are_scaled(tmp_path: Path) -> None:
    local = {"rope_type": "default", "rope_theta": 1e4}
    own = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": local}
    settings = {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}
    new = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    spellings = ({"rope_parameters": own}, {"rope_theta": 1e6, "rope_local_base_freq": 1e4}, {})
    for number, spelling in enumerate(spellings):
        folder = pretrained_folder(tmp_path / str(number), max_position_embeddings=2048, **settings, **spelling)
        found = read_config(folder, pretrained_changes(of_folder(folder, {"rope_type": "linear"})))
        assert found.rope_parameters == {"full_attention": new, "sliding_attention": local}


def test_phi3_keeps_its_own_key_in_step(tmp_path: Path) -> None:
    settings = {"model_type": "phi3", "original_max_position_embeddings": 512, "pad_token_id": 0}
    folder = pretrained_folder(tmp_path / "m", max_position_embeddings=2048, **settings)
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 2048, **LONG}
    found = read_config(folder, pretrained_changes(of_folder(folder, rope)))
    assert found.rope_parameters["original_max_position_embeddings"] == 2048
    assert found.original_max_position_embeddings == 2048


def test_a_model_from_scratch() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 5e5, "original_max_position_embeddings": 1024}
    keywords = transformers_keywords(load_variant(model__rope=rope).config, 1000)
    assert keywords["rope_parameters"] == {**rope, "factor": 4.0}
    assert keywords["max_position_embeddings"] == 4096
    gemma = load_variant(model__architecture="gemma3_text", model__rope=rope, model__kv_heads=4).config
    made = model_config(gemma, 1024, None)
    assert made.rope_parameters["full_attention"]["factor"] == 4.0
    assert made.rope_parameters["sliding_attention"]["rope_type"] == "default"
    dynamic = load_variant(model__rope={"rope_type": "dynamic", "factor": 1}, model__max_positions=1024).config
    assert transformers_keywords(dynamic, 1000)["max_position_embeddings"] == 1024


def test_the_blocks_of_the_page_are_accepted() -> None:
    blocks = re.findall(r"```yaml\n(model:.*?)```", (ROOT / "docs" / "models.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        config = loads(block + "train: {steps: 1}\noutput: {folder: runs/page}\n").config
        assert config.model.rope is not None and config.model.rope.rope_type == "yarn"


def test_the_exported_file_can_be_read(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path / "m", max_position_embeddings=2048)
    config = read_config(folder, pretrained_changes(of_folder(folder, {"rope_type": "yarn"})))
    config.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["max_position_embeddings"] == 8192 and written["rope_parameters"]["factor"] == 4.0
