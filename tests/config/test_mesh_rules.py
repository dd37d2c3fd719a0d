"""Sizes that depend on the number of ranks: a mesh, a row, a batch or a ZeRO group that does not fit is refused."""

from __future__ import annotations

from typing import Any

import pytest
from config_samples import BASE, load_variant, problems_of, refused_by, text_of, variant

from longctx.config.derived import derive
from longctx.config.findings import judge
from longctx.config.load import loads
from longctx.config.mesh_rules import rules_of

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("grid is not the world", {"mesh__world": 8}, "mesh.ring"),
    ("ring does not divide", {"mesh__ring": 3, "mesh__data": "auto"}, "mesh.ring"),
    ("zigzag ring too large", {"data__sequence_length": 3}, "data.sequence_length"),
    (
        "ring too large",
        {"data__sequence_length": 2, "mesh__ring": 4, "mesh__data": 1, "attention__layout": "striped"},
        "data.sequence_length",
    ),
    ("batch not a multiple", {"train__global_batch": 5}, "train.global_batch"),
    ("batch below replicas", {"train__global_batch": 1}, "train.global_batch"),
    ("micro batch above", {"train__micro_batch": 4}, "train.global_batch"),
    ("group that does not divide the world", {"zero__stage": 3, "zero__group": 3}, "zero.group"),
    ("group of the whole world", {"zero__stage": 3, "zero__group": 4}, "zero.group"),
]


@pytest.mark.parametrize(("changes", "key"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_broken_rules_are_refused_by_key(changes: dict[str, Any], key: str) -> None:
    assert key in refused_by(rules_of(changes.get("mesh__world", 4)), changes)


def test_the_launcher_decides_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    problem = problems_of(text_of(BASE)).problems[0]
    assert problem.key == "mesh.world" and "8" in problem.message
    free = variant(mesh__world=..., mesh__data="auto", train__global_batch=8)
    assert derive(loads(text_of(free)).config).data == 4


def test_no_size_is_judged_where_another_world_was_started() -> None:
    """One problem, of `mesh.world`, and none that follows from it."""
    assert [finding.key for finding in judge(rules_of(3), load_variant(zero__stage=3, zero__group=2).config)] == [
        "mesh.world"
    ]
