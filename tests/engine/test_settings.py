"""A DeepSpeed configuration that contradicts the mesh, or misspells a key, is an error that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longctx.engine.settings import load_settings
from longctx.errors import EngineError
from longctx.mesh import Mesh


def mesh() -> Mesh:
    return Mesh(ring=2, ulysses=2, data=3, world_size=12)


@pytest.mark.parametrize(
    ("given", "filled"),
    [
        ({}, (3, 1, 1)),
        ({"train_micro_batch_size_per_gpu": 2}, (6, 2, 1)),
        ({"train_batch_size": 12}, (12, 4, 1)),
        ({"train_batch_size": 12, "gradient_accumulation_steps": 2}, (12, 2, 2)),
        ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 1}, (12, 1, 4)),
        ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}, (12, 2, 2)),
    ],
)
def test_batch_sizes_count_rows_of_a_data_replica(given: dict[str, int], filled: tuple[int, int, int]) -> None:
    settings = load_settings(given, mesh())
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert tuple(settings[key] for key in keys) == filled
    assert settings["sequence_parallel_size"] == 4
    assert "sequence_parallel_size" not in given


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gradient_cliping": 1.0}, "'gradient_clipping'"),
        ({"zero_optimisation": {"stage": 3}}, "'zero_optimization'"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size: 2 contradicts"),
        ({"data_parallel_size": 2}, "data_parallel_size: 2 contradicts"),
        ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}, "= 3"),
        ({"train_batch_size": 10}, "not a multiple of 3"),
        ({"train_micro_batch_size_per_gpu": "auto"}, "'auto'"),
        ({"gradient_accumulation_steps": 0}, "positive integer"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        (None, "config=None"),
        ("missing.json", "cannot be read"),
    ],
)
def test_contradictions_are_named(config: Any, message: str) -> None:
    with pytest.raises(EngineError) as error:
        load_settings(config, mesh())
    assert message in str(error.value)


def test_known_and_future_keys_pass() -> None:
    settings = load_settings({"data_parallel_size": 3, "a_key_of_some_later_version": 1}, mesh())
    assert settings["a_key_of_some_later_version"] == 1
    assert "data_parallel_size" not in settings  # with it DeepSpeed would build a mesh of its own


def test_a_json_file_serves(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}))
    assert load_settings(path, mesh())["train_batch_size"] == 6
    path.write_text("[1]")
    with pytest.raises(EngineError, match="dictionary"):
        load_settings(str(path), mesh())
