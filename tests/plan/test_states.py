"""Bytes of weights, gradients and optimizer states under each ZeRO stage."""

from __future__ import annotations

from dataclasses import replace

import pytest
from config_samples import load_variant

from longctx.config.derived import derive
from longctx.plan.memory import step_bytes
from longctx.plan.setup import Setup, setup_of
from longctx.plan.shape import ModelShape, shape_of
from longctx.plan.states import host_optimizer_bytes, weight_bytes

LLAMA_8B = ModelShape(4096, 32, 32, 8, 128, 14336, 128256)


def test_zero_divides_as_its_paper_says() -> None:
    """Bytes of weights and optimizer states a parameter, bf16: 16, 4 + 12/P (2 + 14/P with gradients), 16/P."""
    for stage, weights, rest in ((0, 2.0, 12.0), (1, 2.0, 12 / 64), (2, 2.0, 12 / 64), (3, 2 / 64, 12 / 64)):
        setup = Setup(2**20, ring=64, stage=stage)
        assert weight_bytes(LLAMA_8B, setup) == pytest.approx(weights * LLAMA_8B.parameters, rel=1e-6)
        assert host_optimizer_bytes(LLAMA_8B, setup) == pytest.approx(rest * LLAMA_8B.parameters, rel=1e-6)


def test_an_optimizer_on_nvme_is_on_disk_and_its_buffers_in_host_memory() -> None:
    config = load_variant(
        zero__stage=3, zero__offload_optimizer="nvme", zero__nvme_folder="/nvme", model__dtype="bf16"
    ).config
    shape = shape_of(config)
    setup = setup_of(config, derive(config, 4), shape)
    assert setup.offload_optimizer and setup.swap_optimizer
    own = -(-shape.parameters // 4)
    memory, on_host = step_bytes(shape, setup), step_bytes(shape, replace(setup, swap_optimizer=False))
    assert memory.disk == 16 * own and on_host.disk == 0
    assert memory.moments == on_host.moments  # nothing changes on the device
    large = replace(setup, ring=1, data=1)
    assert step_bytes(LLAMA_8B, large).host["optimizer"] == 4 * LLAMA_8B.parameters + 16 * 100_000_000
