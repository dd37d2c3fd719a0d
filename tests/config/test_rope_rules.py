"""`model.rope`: each mistake is told with its key, its value and what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_samples import BASE, load_variant, problems_of, text_of, variant
from pretrained_folders import GPT2, gpt2_weights, pretrained_folder

from longctx.config.findings import judge
from longctx.config.load import loads
from longctx.config.pretrained import FOLDER_RULES
from longctx.config.rope_rules import RULES, of_the_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
EIGHT = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}


def told(folder: Path, **changes: Any) -> tuple[str, str]:
    """Return the one thing that a run of a folder is told."""
    sources: dict[str, Any] = {"data__tokenizer": ..., "data__vocab_size": ..., "model__pretrained": str(folder)}
    unset: dict[str, Any] = {f"model__{key}": ... for key in BASE["model"] if key != "dtype"}
    loaded = loads(text_of(variant(**{**unset, **sources, **changes})))
    ((key, message, _),) = judge(FOLDER_RULES, loaded.config)
    return key, message


def told_of(**changes: Any) -> list[Any]:
    return list(problems_of(text_of(variant(**changes))).problems)


@pytest.mark.parametrize(
    ("rope", "key", "message"),
    [
        ({"factor": 4}, "rope_type", "is missing; expected one of default, linear"),
        ({"rope_type": "yarn"}, "original_max_position_embeddings", "needs it in a model from scratch"),
        ({"rope_type": "linear"}, "factor", "is missing; rope_type linear needs it"),
        ({"rope_type": "dynamic"}, "factor", "is missing; 1 lets the base grow"),
        ({"rope_type": "dynamic", "factor": 2}, "rope_type", "changes nothing in rows of 4,096"),
        ({**YARN, "low_freq_factor": 2}, "low_freq_factor", "got 2.0, which rope_type yarn does not use (only llama3)"),
        ({**YARN, "beta_slow": 64}, "beta_fast", "got 32, not above beta_slow 64"),
        ({**YARN, "factor": 2}, "factor", "extends 1,024 positions to 2,048, but rows have 4,096; use 4"),
        ({**YARN, "rope_type": "llama3", "low_freq_factor": 9}, "high_freq_factor", "got 4, not above low_freq_factor"),
        ({**YARN, "rope_type": "longrope"}, "short_factor", "needs one number for each of the 8 frequencies"),
        ({**YARN, "rope_type": "longrope", **EIGHT, "long_factor": [1]}, "long_factor", "got 1 numbers; give one"),
        ({**YARN, "rope_type": "longrope", **EIGHT, "long_factor": [0.0] * 8}, "long_factor", "each is above 0"),
        ({**YARN, "thetta": 1e6}, "thetta", "did you mean 'rope_theta'?"),
    ],
)
def test_mistakes_are_named(rope: dict[str, Any], key: str, message: str) -> None:
    told = [problem for problem in told_of(model__rope=rope) if problem.key == f"model.rope.{key}"]
    assert told and message in told[0].message


def test_a_model_without_rotary_positions() -> None:
    changes: dict[str, Any] = {"model__architecture": "gpt2", "model__kv_heads": ...}
    (problem,) = told_of(model__rope=YARN, **changes)
    assert (problem.key, problem.code) == ("model.rope", "rope") and "gpt2 has no rotary" in problem.message


def test_two_sources() -> None:
    (problem,) = told_of(model__rope=YARN, model__extra={"rope_parameters": {"rope_type": "default"}})
    assert problem.key == "model.extra.rope_parameters" and "remove one of the two" in problem.message


def test_of_a_folder(tmp_path: Path) -> None:
    learned = pretrained_folder(tmp_path / "gpt2", GPT2, gpt2_weights())
    assert told(learned, model__rope=YARN) == (
        "model.rope",
        "the folder's model has no rotary positions; remove the key",
    )
    scaled = pretrained_folder(tmp_path / "yarn", max_position_embeddings=2048, rope_scaling={**YARN, "factor": 2.0})
    key, message = told(scaled, model__rope={"rope_type": "llama3"})
    assert key == "model.rope.original_max_position_embeddings" and "folder's yarn RoPE is scaled already" in message
    key, message = told(scaled)
    assert key == "data.sequence_length" and "set model.rope (rope_type yarn, say)" in message


def test_the_rules_accept_what_fits() -> None:
    config = load_variant(model__rope=YARN).config
    assert not [finding for rule in RULES for finding in rule(config)]
    assert not list(of_the_model(config, {}))
