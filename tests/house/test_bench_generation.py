"""The script of the paper's table, end to end at a tiny size."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import generation
from benchmarks.generation import Model, largest_batch


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {name: Model(name, 2, 32, 4, model.encoder_decoder, 300) for name, model in generation.MODELS.items()}
    monkeypatch.setattr(generation, "MODELS", tiny)
    results = tmp_path / "generation.csv"
    monkeypatch.setattr(generation, "BEAMS", (4,))
    wanted = ["--shapes", "bart-large", "gpt2", "--turns", "1", "--cap-mib", "1"]
    found = generation.main([*wanted, "--results", str(results)])
    with results.open() as stream:
        assert len(list(csv.DictReader(stream))) == len(found) == 2 * 2 * 3
    assert all(row["same_tokens"] and row["samples_per_second"] != "does not fit" for row in found)
    for row in found:
        assert row["batch"] == "equal batch" or row["cache_bytes"] <= 2**20
    beams = [row for row in found if row["model"] == "bart-large" and row["batch"] == "largest batch"]
    kept, shared, hidden = (row["rows"] for row in beams)
    assert kept < shared < hidden


def test_the_largest_batch_is_the_largest() -> None:
    model = generation.MODELS["gpt2"]
    for method, count in generation.BYTES.items():
        rows = largest_batch(model, method, 4, 100, 20, 10**9, 2)
        assert count(model.shape(rows, 4, 100, 20, 2)) <= 10**9 < count(model.shape(rows + 1, 4, 100, 20, 2))
