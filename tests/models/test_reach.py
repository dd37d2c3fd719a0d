"""How many positions a model has, and whether a setting can raise the number."""

from __future__ import annotations

from typing import Any

import pytest

from longctx.models.load.headers import Weight
from longctx.models.load.reach import Reach, reach_of

TABLE = {"wpe.weight": Weight("F32", (64, 8), "model.safetensors")}


@pytest.mark.parametrize(
    ("settings", "weights", "wanted"),
    [
        ({"max_position_embeddings": 128}, {}, Reach(128, False, None)),
        ({}, {}, None),
        ({"max_position_embeddings": 128, "alibi": True}, {}, None),
        ({"n_positions": 128}, {}, Reach(128, True, None)),
        ({"n_positions": 128}, TABLE, Reach(64, True, None)),
        ({"max_position_embeddings": 66, "model_type": "roberta", "pad_token_id": 1}, {}, Reach(64, False, None)),
        ({"max_position_embeddings": 128, "rope_scaling": {"type": "dynamic"}}, {}, None),
        ({"max_position_embeddings": 128, "rope_parameters": {"rope_type": "yarn"}}, {}, Reach(128, False, "yarn")),
        (
            {"max_position_embeddings": 128, "rope_parameters": {"full_attention": {"rope_type": "longrope"}}},
            {},
            Reach(128, False, "longrope"),
        ),
        ({"max_position_embeddings": 128, "rope_parameters": {"rope_type": "linear"}}, {}, Reach(128, False, None)),
        ({"text_config": {"max_position_embeddings": 32}}, {}, Reach(32, False, None)),
    ],
)
def test_reach(settings: dict[str, Any], weights: dict[str, Weight], wanted: Reach | None) -> None:
    assert reach_of(settings, weights) == wanted
