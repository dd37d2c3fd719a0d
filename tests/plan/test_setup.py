"""A run's settings arrive in the planner, with `auto` resolved as the run resolves it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from config_samples import load_variant

from longctx.config.derived import derive
from longctx.nn.tiling import choose_tile
from longctx.plan.setup import Setup, resolve_loss_tile, resolve_mlp_tile, setup_of
from longctx.plan.shape import ModelShape, shape_of

LLAMA_8B = ModelShape(4096, 32, 32, 8, 128, 14336, 128256)


@pytest.mark.parametrize("vocabulary", [1000, 32_000, 128_256])
def test_tiles_are_those_that_the_run_chooses(vocabulary: int) -> None:
    shape = replace(LLAMA_8B, vocab=vocabulary)
    for device, on_gpu in (("cpu", False), ("cuda", True)):
        assert resolve_loss_tile("auto", shape, on_gpu) == choose_tile("auto", vocabulary, torch.device(device))


def test_every_choice_of_a_yaml_arrives() -> None:
    config = load_variant(
        zero__stage=3, zero__offload_optimizer="cpu", memory__recompute="layer", memory__loss_tile=64,
        memory__mlp_tile="auto", train__micro_batch=2, deepspeed__zero_optimization={"reduce_bucket_size": 1000},
    ).config  # fmt: skip
    setup = setup_of(config, derive(config, 4), shape_of(config), on_gpu=False)
    assert (setup.stage, setup.offload_optimizer, setup.recompute) == (3, True, "layer")
    assert (setup.loss_tile, setup.mlp_tile, setup.rows, setup.bucket) == (64, 128, 2, 1000)
    assert (setup.ring, setup.data, setup.local, setup.n) == (2, 2, 2048, 4096)


def test_tiles_as_a_yaml_writes_them() -> None:
    assert resolve_mlp_tile("auto", LLAMA_8B) == 2048 and resolve_mlp_tile("auto", replace(LLAMA_8B, hidden=64)) == 128
    for resolve in (resolve_mlp_tile, lambda tile, shape: resolve_loss_tile(tile, shape, True)):
        assert resolve("none", LLAMA_8B) is None and resolve(None, LLAMA_8B) is None and resolve(96, LLAMA_8B) == 96


def test_ranks_and_tokens_per_rank() -> None:
    setup = Setup(1000, ring=3, ulysses=2, data=4, rows=2)
    assert (setup.sequence, setup.world, setup.local, setup.n) == (6, 24, 167, 334)
