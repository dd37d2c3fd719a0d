"""Sizes of a run: `auto` filled in, accumulation, lengths."""

from __future__ import annotations

from typing import Any

import pytest
from config_samples import load_variant, text_of, variant

from longctx.config.derived import accumulation_of, derive, world_size
from longctx.config.load import loads
from longctx.errors import ConfigError


@pytest.mark.parametrize(
    ("ring", "data", "world", "default", "grid"),
    [
        ("auto", "auto", "auto", 2, (2, 1)),
        ("auto", "auto", "auto", 8, (8, 1)),
        (4, "auto", "auto", 2, (4, 1)),
        (2, "auto", "auto", 8, (2, 4)),
        ("auto", 2, "auto", 8, (4, 2)),
        ("auto", 3, "auto", 2, (1, 3)),
        (2, 2, "auto", 2, (2, 2)),
        (1, "auto", 4, 2, (1, 4)),
        (64, 1, "auto", 2, (64, 1)),
    ],
)
def test_auto_fills_the_mesh(ring: Any, data: Any, world: Any, default: int, grid: tuple[int, int]):
    text = text_of(variant(mesh__ring=ring, mesh__data=data, mesh__world=world, train__global_batch=...))
    config = loads(text, default_world=default).config
    size = derive(config, world_size(config, default))
    assert (size.ring, size.data) == grid and size.world == size.ring * size.data


@pytest.mark.parametrize(
    ("mesh", "world", "more", "grid"),
    [
        ({"ring": 2, "ulysses": 2}, 4, {}, (2, 2, 1)),
        ({"ring": "auto", "ulysses": 2}, 8, {}, (4, 2, 1)),
        ({"ring": "auto", "ulysses": "auto"}, 8, {}, (2, 4, 1)),  # 4 key/value heads
        ({"ring": "auto", "ulysses": "auto", "data": 2}, 8, {}, (1, 4, 2)),
        ({"ring": 2, "ulysses": "auto", "data": 2}, 12, {}, (2, 3, 2)),  # what the two leave
        ({"ring": 1, "ulysses": "auto"}, 8, {}, (1, 4, 2)),
        ({"ring": "auto", "ulysses": "auto"}, 6, {}, (3, 2, 1)),
        ({"ring": "auto", "ulysses": "auto"}, 8, {"model__kv_heads": 1}, (8, 1, 1)),
        ({"ring": "auto", "ulysses": "auto"}, 8, {"attention__layers": {"0": "abc"}}, (8, 1, 1)),
        ({"ring": "auto", "ulysses": "auto"}, 16, {"launch__launcher": "slurm"}, (16, 1, 1)),
        (
            {"ring": "auto", "ulysses": "auto"},
            16,
            {"launch__launcher": "slurm", "launch__ranks_per_host": 2},
            (8, 2, 1),
        ),
        (
            {"ring": "auto", "ulysses": "auto"},
            6,
            {"launch__launcher": "openmpi", "launch__hosts": ["a:4", "b:2"]},
            (3, 2, 1),
        ),
    ],
)
def test_auto_uses_ulysses_inside_a_host(mesh: dict, world: int, more: dict, grid: tuple[int, int, int]):
    keys = {f"mesh__{key}": mesh.get(key, ...) for key in ("ring", "ulysses", "data", "world")}
    changes = {"model__heads": 8, "model__kv_heads": 4, "train__global_batch": ..., **keys, **more}
    size = derive(loads(text_of(variant(**changes)), default_world=world).config, world)
    assert (size.ring, size.ulysses, size.data) == grid


def test_sizes_follow():
    size = derive(load_variant(train__global_batch=12, data__sequence_length=4097).config)
    assert (size.accumulation, size.global_batch, size.micro_batch) == (6, 12, 1)
    assert (size.padded_length, size.local_length, size.tokens_per_step) == (4100, 2050, 12 * 4097)


def test_a_batch_that_is_not_whole_names_its_neighbours() -> None:
    train = load_variant(train__global_batch=12).config.train
    assert accumulation_of(train, 4) == 3
    with pytest.raises(ConfigError, match="is not a multiple of .* = 5; write 10 or 15"):
        accumulation_of(train, 5)
