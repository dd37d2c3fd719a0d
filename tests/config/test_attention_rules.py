"""A window and a Ulysses size that the model's attention does not support are refused by key."""

from __future__ import annotations

from typing import Any

import pytest
from config_samples import FROM_FOLDER, load_variant, refused_by

from longctx.config.attention_rules import RULES

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("ulysses above heads", {"mesh__ulysses": 16, "mesh__ring": 1, "mesh__data": 1, "mesh__world": 16}, "mesh.ulysses"),
    (
        "ulysses of bounded layers",
        {"mesh__ulysses": 2, "mesh__data": 1, "attention__layers": {"0": "abc"}},
        "mesh.ulysses",
    ),
    ("window without one", {"attention__window": 64}, "attention.window"),
    ("window as long", {"attention__window": 4096, "model__architecture": "mistral"}, "attention.window"),
    ("window of a folder", {**FROM_FOLDER, "model__pretrained": "m", "attention__window": 64}, "attention.window"),
]


@pytest.mark.parametrize(("changes", "key"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_broken_rules_are_refused_by_key(changes: dict[str, Any], key: str) -> None:
    assert key in refused_by(RULES, changes)


def test_legal_ones_pass() -> None:
    load_variant(attention__window=4095, model__architecture="mistral")
    load_variant(mesh__ulysses=4, mesh__ring=1, mesh__data=1)
