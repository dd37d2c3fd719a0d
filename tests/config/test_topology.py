"""Ranks per host and heads, from the configuration, the launcher and a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_samples import FROM_FOLDER, load_variant, text_of, variant

from longctx.config.derived import derive
from longctx.config.load import loads
from longctx.config.topology import has_bounded_layers, heads, ranks_per_host, ulysses_limits, weights_group
from longctx.config.ulysses import UlyssesLimits


def test_heads_of_a_folder_are_read_where_they_can_be(tmp_path: Path) -> None:
    changes = {**FROM_FOLDER, "model__pretrained": str(tmp_path), "mesh__ulysses": "auto", "mesh__ring": "auto"}
    changes |= {"mesh__data": ..., "mesh__world": ..., "train__global_batch": ...}
    assert heads(load_variant(**FROM_FOLDER, model__pretrained=str(tmp_path)).config) == (None, None)
    config = loads(text_of(variant(**changes)), default_world=4).config
    assert derive(config, 4).ulysses == 1
    (tmp_path / "config.json").write_text('{"num_attention_heads": 8, "num_key_value_heads": 2}')
    assert derive(config, 4).ulysses == 2
    assert heads(config) == (8, 2)


@pytest.mark.parametrize(
    ("launch", "per_host"),
    [
        ({}, 8),
        ({"launcher": "slurm"}, None),
        ({"launcher": "slurm", "ranks_per_host": 4}, 4),
        ({"launcher": "openmpi", "hosts": ["a:4", "b:6"]}, 2),  # the greatest common divisor
        ({"launcher": "openmpi", "hosts": ["a:4", "b"], "ranks_per_host": 4}, 4),
        ({"launcher": "openmpi", "hosts": ["a:4", "b"]}, None),
    ],
)
def test_ranks_per_host(launch: dict[str, Any], per_host: int | None) -> None:
    config = load_variant(**{f"launch__{key}": value for key, value in launch.items()}).config
    assert ranks_per_host(config, 8) == per_host


def test_a_local_launcher_tells_the_ranks_of_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ranks_per_host(load_variant().config, 8) == 2


@pytest.mark.parametrize(
    ("group", "world", "per_host", "found"),
    [("none", 8, 4, None), (2, 8, 4, 2), ("auto", 8, 4, 4), ("auto", 8, 8, None), ("auto", 8, 3, None)],
)
def test_the_group_of_the_second_copy(group: Any, world: int, per_host: int, found: int | None) -> None:
    assert weights_group(load_variant(zero__stage=3, zero__group=group).config, world, per_host) == found


def test_a_bounded_layer_leaves_no_room_for_ulysses() -> None:
    exact, bounded = (load_variant(attention__layers={"0": kind}).config for kind in ("ring", "abc"))
    assert not has_bounded_layers(exact) and has_bounded_layers(bounded)
    assert ulysses_limits(exact, 4) == UlyssesLimits(2, 4, 4)
    assert ulysses_limits(bounded, 4) == UlyssesLimits(None, 4, 4)
