"""`longctx explain`."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run
from config_samples import text_of, variant


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text_of(variant(output__folder=str(tmp_path / "run"))))
    return path


def test_explain_with_and_without_a_file(good: Path):
    every = run("explain", good).stdout
    assert "train.lr" in every and f"{good}:" in every and "derived.accumulation" in every
    one = run("explain", good, "train.lr", "train.lr=0.5").stdout
    assert "train.lr = 0.5  (override train.lr)" in one and "peak learning rate" in one
    assert "train.steps  (required)" in run("explain", "train.steps").stdout
