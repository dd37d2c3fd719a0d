"""RoPE parameters are read from every spelling of a config.json, and written back where the model reads them."""

from __future__ import annotations

from typing import Any

import pytest

from longctx.models.load.rope import by_layer_type, rope_changes, rope_of

LOCAL = {"rope_type": "default", "rope_theta": 1e4}
NESTED = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": LOCAL}


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, {}),
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, {"rope_type": "yarn", "factor": 4.0}),
        ({"rope_parameters": NESTED}, NESTED["full_attention"]),
        (
            {"original_max_position_embeddings": 4096, "rope_scaling": {"type": "longrope"}},
            {"rope_type": "longrope", "original_max_position_embeddings": 4096},
        ),
    ],
)
def test_it_is_read_in_every_spelling(settings: dict[str, Any], found: dict[str, Any]) -> None:
    assert rope_of(settings) == found


def test_it_is_written_where_the_model_reads_it() -> None:
    new = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert rope_changes({"model_type": "llama"}, new) == {"rope_parameters": new}
    both = {"full_attention": new, "sliding_attention": LOCAL}
    assert rope_changes({"rope_parameters": NESTED}, new) == {"rope_parameters": both}
    assert rope_changes({"model_type": "gemma3_text"}, new) == {"rope_parameters": {"full_attention": new}}
    phi = rope_changes({"model_type": "phi3", "original_max_position_embeddings": 4096}, new)
    assert phi == {"rope_parameters": new, "original_max_position_embeddings": 2048}
    assert by_layer_type({"model_type": "longctx_gemma3_text"}) and not by_layer_type({"model_type": "llama"})
