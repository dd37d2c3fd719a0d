"""Explanations: value, where it is set, meaning and what is accepted."""

from __future__ import annotations

import pytest
from config_samples import BASE, text_of

from longctx.config.explain import explain
from longctx.config.keys import leaves
from longctx.config.load import loads
from longctx.errors import ConfigError


def test_explain_says_value_source_and_meaning() -> None:
    loaded = loads(text_of(BASE), ["train.lr=0.5"], name="run.yaml")
    rows = {row.key: row for row in explain(loaded, [])}
    assert set(leaves()) <= set(rows)
    assert rows["train.lr"].value == "0.5" and rows["train.lr"].source == "override train.lr"
    assert rows["train.steps"].source.startswith("run.yaml:") and rows["train.seed"].source == "default"
    assert rows["derived.accumulation"].value == "2" and rows["derived.world"].value == "4"
    assert [row.key for row in explain(loaded, ["mesh"])] == ["mesh.ring", "mesh.ulysses", "mesh.data", "mesh.world"]
    assert [row.source for row in explain(None, ["train.steps", "train.lr"])] == ["required", "default"]


@pytest.mark.parametrize(("name", "near"), [("train.clips", "train.clip"), ("trian", "train"), ("lr", "train.lr")])
def test_explain_knows_no_such_key(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        explain(None, [name])
