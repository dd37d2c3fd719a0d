"""`attention.layers`: indices, kinds and options that do not exist or do not fit the model are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_samples import FROM_FOLDER, load_variant, refused_by

from longctx.config.layer_rules import RULES

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("a layer too many", {"attention__layers": {"0-90": "abc"}}, "attention.layers"),
    ("unknown kind of layer", {"attention__layers": {"0": "abd"}}, "attention.layers"),
    ("unknown option of a layer", {"attention__layers": {"0": {"abc": {"slot": 3}}}}, "attention.layers"),
    ("layers of gemma", {"attention__layers": {"0": "abc"}, "model__architecture": "gemma"}, "attention.layers"),
    ("striped bounded layer", {"attention__layers": {"0": "abc"}, "attention__layout": "striped"}, "attention.layout"),
    ("future", {"attention__layers": {"0": {"abc": {"normalizer": "global"}}}}, "attention.layers"),
    (
        "linformer too short",
        {"attention__layers": {"*": {"abc": {"control": "linformer", "max_length": 9}}}},
        "attention.layers",
    ),
]


@pytest.mark.parametrize(("changes", "key"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_broken_rules_are_refused_by_key(changes: dict[str, Any], key: str) -> None:
    assert key in refused_by(RULES, changes)


def test_legal_ones_pass() -> None:
    load_variant(attention__layers={"*": {"abc": {"control": "linformer", "max_length": 4096}}, "1": "ring"})


def test_layers_of_a_folder_are_read_where_they_can_be(tmp_path: Path) -> None:
    changes = {**FROM_FOLDER, "model__pretrained": str(tmp_path), "attention__layers": {"5": "abc"}}
    assert refused_by(RULES, changes) == set(), "unknown before the folder is there"
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 5}')
    assert refused_by(RULES, changes) == {"attention.layers"}
    (tmp_path / "config.json").write_text('{"model_type": "bloom", "n_layer": 6}')
    assert refused_by(RULES, changes) == {"attention.layers"}
