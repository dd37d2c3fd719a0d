"""Weights that are not those of the config are named, the worst mismatch first."""

from __future__ import annotations

from typing import Any

import pytest

from longctx.models.load.expected import count_parameters, mismatches, tied
from longctx.models.load.headers import Weight

SETTINGS = {
    "model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 10,
}  # fmt: skip


def weights(**changes: Any) -> dict[str, Weight]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (10, 8), "lm_head.weight": (10, 8)}
    for layer in range(2):
        for name, shape in (
            ("self_attn.q_proj", (8, 8)), ("self_attn.k_proj", (4, 8)), ("self_attn.v_proj", (4, 8)),
            ("self_attn.o_proj", (8, 8)), ("mlp.gate_proj", (12, 8)), ("mlp.up_proj", (12, 8)),
            ("mlp.down_proj", (8, 12)),
        ):  # fmt: skip
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    found = {name: Weight("F32", shape, "model.safetensors") for name, shape in shapes.items()}
    for name, value in changes.items():
        if value is None:
            del found[name]
        else:
            found[name] = value
    return found


def test_a_matching_folder_has_no_mismatch() -> None:
    assert list(mismatches(SETTINGS, weights())) == []
    layer = 8 * 8 * 2 + 2 * 4 * 8 + 3 * 8 * 12
    assert count_parameters(SETTINGS, weights()) == 2 * 80 + 2 * layer
    assert count_parameters(SETTINGS | {"tie_word_embeddings": True}, weights()) == 80 + 2 * layer


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"vocab_size": 11}, {}, "embed_tokens.weight has 10 rows, but config.json says vocab_size 11"),
        ({"num_hidden_layers": 3}, {}, "3 layers, but the weights of layer 2 are not there"),
        ({"num_hidden_layers": 1}, {}, "1 layers, but there are weights of layer 1"),
        ({"intermediate_size": 13}, {}, "mlp.gate_proj.weight of layer 0 is 12 x 8, but config.json asks for 13 x 8"),
        ({}, {"model.layers.1.mlp.up_proj.weight": None}, "layer 1 lacks mlp.up_proj.weight"),
        ({}, {"lm_head.weight": None}, "there is no lm_head.weight"),
        ({}, {"lm_head.weight": Weight("I8", (10, 8), "")}, "lm_head.weight is stored as I8: quantised"),
    ],
)
def test_the_first_mismatch_is_named(settings: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    assert message in next(mismatches(SETTINGS | settings, weights(**changes)))


def test_tying_is_the_files_word_or_the_classs() -> None:
    assert not tied(SETTINGS) and tied({"model_type": "gpt2"}) and tied({"model_type": "longctx_gpt2"})
    assert not tied({"model_type": "gpt2", "tie_word_embeddings": False})
