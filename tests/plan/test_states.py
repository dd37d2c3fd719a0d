"""Bytes of weights, gradients and optimizer states under each ZeRO stage."""

from __future__ import annotations

from dataclasses import replace

import pytest
from config_samples import load_variant

from longctx.config.derived import derive
from longctx.plan.memory import step_bytes
from longctx.plan.setup import Setup, setup_of
from longctx.plan.shape import ModelShape, shape_of
from longctx.plan.states import (
    bucket_bytes,
    computed_gradient_bytes,
    host_optimizer_bytes,
    resident_gradient_bytes,
    weight_bytes,
)

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


def test_gradients_by_stage() -> None:
    """bf16: whole until the step (0, 1); the rank's part, a shared weight whole (2); a flat buffer of shards (3)."""
    everything, part = LLAMA_8B.parameters, -(-LLAMA_8B.parameters // 64)
    for stage, resident, computed in ((0, 4 * everything, 2 * everything), (1, 0, 2 * everything), (3, 2 * part, 0)):
        setup = Setup(2**20, ring=64, stage=stage)
        assert resident_gradient_bytes(LLAMA_8B, setup) == resident
        assert computed_gradient_bytes(LLAMA_8B, setup, everything) == computed
    second = Setup(2**20, ring=64, stage=2)
    assert computed_gradient_bytes(LLAMA_8B, second, everything) == 2 * LLAMA_8B.embedding, "the head, beyond its part"
    assert computed_gradient_bytes(LLAMA_8B, replace(second, ring=2), everything) == LLAMA_8B.parameters


def test_buckets_are_doubled_by_overlap_and_in_fp32_where_ranks_share_a_sequence() -> None:
    for stage, copies in ((0, 0), (1, 2), (2, 2), (3, 1)):
        setup = Setup(2**20, data=8, stage=stage, bucket=1000, overlap_comm=True)
        assert bucket_bytes(LLAMA_8B, setup) == copies * 1000 * 2
        assert bucket_bytes(LLAMA_8B, replace(setup, ring=2)) == copies * 1000 * 4
        assert bucket_bytes(LLAMA_8B, setup, computed=0) == (2000 if stage == 3 else 0)
