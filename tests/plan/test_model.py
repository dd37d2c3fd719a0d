"""The planner's formulas beside what they are formulas of: parameters, FLOPs, tiles, schedules, ZeRO's arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from config_samples import load_variant
from hypothesis import given
from hypothesis import strategies as st

from longctx.attention.band import make_rule
from longctx.attention.schedule import make_schedule
from longctx.config.derived import derive
from longctx.errors import ConfigError
from longctx.nn.tiling import choose_tile
from longctx.plan.limit import fits, further, longest
from longctx.plan.machines import GIB, MACHINES, machine_named
from longctx.plan.memory import PARTS, peak_bytes, step_bytes
from longctx.plan.setup import Setup, resolve_loss_tile, setup_of
from longctx.plan.shape import ModelShape, shape_of, shape_of_settings
from longctx.plan.speed import overlap_of, speed_of
from longctx.plan.states import host_optimizer_bytes, weight_bytes
from longctx.plan.traffic import hops_of
from longctx.plan.work import flops_of, layer_of, pairs, wire_of
from longctx.train.report.flops import FlopsModel

LLAMA_8B = ModelShape(4096, 32, 32, 8, 128, 14336, 128256)
H100 = MACHINES["h100"]


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    shape = shape_of_settings(config.to_dict(), 4)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert LLAMA_8B.parameters == 8_030_261_248  # Llama 3.1 8B


def test_a_yaml_has_the_shape_of_its_model() -> None:
    shape = shape_of(load_variant(model__kv_heads=2, model__dtype="bf16").config)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.inner, shape.itemsize) == (4, 2, 16, 192, 2)
    layers: dict[str, Any] = {"0": {"window": 64}, "1": {"abc": {"slots": 32}}}
    mixed = shape_of(load_variant(attention__layers=layers).config)
    assert (mixed.full_layers, mixed.window_layers, mixed.window, mixed.bounded_layers, mixed.slots) == (
        0,
        1,
        64,
        1,
        32,
    )
    with pytest.raises(ConfigError, match="no num_attention_heads"):
        shape_of_settings({"hidden_size": 64})


@pytest.mark.parametrize("window", [None, 100])
def test_flops_are_those_that_training_counts(window: int | None) -> None:
    from transformers import MistralConfig

    config = MistralConfig(
        vocab_size=300, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, sliding_window=window,
    )  # fmt: skip
    shape, length = shape_of_settings(config.to_dict(), 4), 512
    counted = FlopsModel(config, shape.parameters)
    batch = {"position_ids": torch.arange(length)[None], "document_ids": torch.zeros(1, length, dtype=torch.int32)}
    seen = pairs(shape, Setup(length))
    assert seen == counted.pairs(batch)
    norms = 6 * (2 * shape.layers + 1) * shape.hidden * length  # training counts their few weights as products
    assert flops_of(shape, Setup(length)).useful + norms == pytest.approx(counted.step(length, seen), rel=1e-12)


@given(
    st.sampled_from(["zigzag", "contiguous", "striped"]), st.integers(2, 12), st.integers(1, 6),
    st.none() | st.integers(1, 200),
)  # fmt: skip
def test_the_ring_sends_what_its_schedule_says(layout: str, ring: int, blocks: int, window: int | None) -> None:
    """Rank by rank; `None` is at least as much as any rank sends."""
    block = 2 * blocks
    schedule = make_schedule(layout, ring, ring * block, make_rule(True, window))
    most = hops_of(layout, ring, block, window)
    for rank in range(ring):
        stages = schedule.stages(rank)
        sends = [stage.kv_to is not None for stage in stages], [stage.grad_to is not None for stage in stages]
        assert hops_of(layout, ring, block, window, rank) == (sum(sends[0]), sum(sends[1]))
        assert most.kv >= sum(sends[0]) and most.gradients >= sum(sends[1])
    if window is None:
        wire, layer = wire_of(LLAMA_8B, Setup(ring * block, ring=ring, layout=layout)), LLAMA_8B.layers
        one = layer_of(LLAMA_8B, Setup(ring * block, ring=ring, layout=layout))
        assert wire.ring_forward == layer * most.kv * one.kv_bytes
        assert wire.ring_backward == wire.ring_forward + layer * most.gradients * one.gradient_bytes


def test_a_windows_blocks_go_no_further_in_a_large_ring() -> None:
    for layout, window in (("zigzag", 5000), ("zigzag", 9000), ("contiguous", 9000), ("striped", 3)):
        large = make_schedule(layout, 64, 64 * 4096, make_rule(True, window))
        sends = [sum(stage.kv_to is not None for stage in large.stages(rank)) for rank in range(64)]
        assert hops_of(layout, 64, 4096, window).kv == max(sends)
    windowed = replace(LLAMA_8B, window=4096, window_layers=LLAMA_8B.layers)
    setup = Setup(2**22, ring=1024)
    assert wire_of(windowed, setup).ring_forward < wire_of(LLAMA_8B, setup).ring_forward / 100
    assert speed_of(windowed, setup, H100).total < speed_of(LLAMA_8B, setup, H100).total / 5


@pytest.mark.parametrize("vocabulary", [1000, 32_000, 128_256])
def test_tiles_are_those_that_the_run_chooses(vocabulary: int) -> None:
    shape = replace(LLAMA_8B, vocab=vocabulary)
    for device, on_gpu in (("cpu", False), ("cuda", True)):
        assert resolve_loss_tile("auto", shape, on_gpu) == choose_tile("auto", vocabulary, torch.device(device))


def test_zero_divides_as_its_paper_says() -> None:
    """Bytes of weights and optimizer states a parameter, bf16: 16, 4 + 12/P (2 + 14/P with gradients), 16/P."""
    for stage, weights, rest in ((0, 2.0, 12.0), (1, 2.0, 12 / 64), (2, 2.0, 12 / 64), (3, 2 / 64, 12 / 64)):
        setup = Setup(2**20, ring=64, stage=stage)
        assert weight_bytes(LLAMA_8B, setup) == pytest.approx(weights * LLAMA_8B.parameters, rel=1e-6)
        assert host_optimizer_bytes(LLAMA_8B, setup) == pytest.approx(rest * LLAMA_8B.parameters, rel=1e-6)


def test_a_ring_holds_the_same_however_many_share_it() -> None:
    small, large = (
        peak_bytes(LLAMA_8B, Setup(16384 * ring, ring=ring, stage=0, recompute="layer")) for ring in (8, 1024)
    )
    assert small == large


@given(
    st.sampled_from(["none", "mlp", "layer", "layer_keep_attention"]), st.integers(0, 3), st.booleans(),
    st.sampled_from([None, 512]), st.sampled_from([None, 512]), st.integers(1, 8), st.integers(10, 20),
)  # fmt: skip
def test_parts_are_never_negative_and_more_tokens_never_cost_less(
    recompute: Any, stage: int, offload: bool, loss: int | None, mlp: int | None, ring: int, exponent: int
) -> None:
    setup = Setup(
        2**exponent * ring, ring=ring, stage=stage, recompute=recompute, loss_tile=loss, mlp_tile=mlp,
        offload_optimizer=offload and stage > 0,
    )  # fmt: skip
    for moment in step_bytes(LLAMA_8B, setup).moments:
        assert set(moment.parts) <= set(PARTS) and all(value >= 0 for value in moment.parts.values()), moment
    assert peak_bytes(LLAMA_8B, replace(setup, tokens=2 * setup.tokens)) >= peak_bytes(LLAMA_8B, setup)


def test_the_longest_sequence_fits_and_a_longer_one_does_not() -> None:
    setup = Setup(2**20, ring=8, recompute="layer_keep_attention", loss_tile=2048, mlp_tile=4096)
    best = longest(LLAMA_8B, setup, H100)
    assert fits(LLAMA_8B, replace(setup, tokens=best), H100)
    assert not fits(LLAMA_8B, replace(setup, tokens=int(best * 1.01)), H100)
    assert longest(LLAMA_8B, replace(setup, stage=0), H100) == 0
    for change in further(LLAMA_8B, setup, H100):
        assert change.longest > best, change


def test_overlap_follows_the_paper() -> None:
    """c >= F/B without causality, equal heads and 2-byte gradients (Ring Attention, Table 2: 1.0K for an A100)."""
    a100 = replace(MACHINES["a100"], attention=1.0, link=300e9)
    plain = overlap_of(replace(LLAMA_8B, kv_heads=32), Setup(2**20, ring=8, layout="contiguous"), a100)
    assert plain.least_forward == pytest.approx(312e12 / 300e9)
    grouped = overlap_of(LLAMA_8B, Setup(2**20, ring=8), a100)
    assert grouped.least_forward == pytest.approx(2 * 312e12 / 300e9 / 4)


def test_more_work_takes_longer_and_nothing_beats_the_peak() -> None:
    for machine in MACHINES.values():
        setup = Setup(2**20, ring=8, recompute="layer_keep_attention")
        speed, again = (speed_of(LLAMA_8B, s, machine) for s in (setup, replace(setup, recompute="layer")))
        assert 0 < again.mfu < speed.mfu < 1
        assert sum(speed.seconds.values()) == speed.total


def test_machines_are_known_by_name() -> None:
    assert machine_named("H100").memory == 80 * GIB
    with pytest.raises(ConfigError, match="h100"):
        machine_named("h1000")


def test_every_choice_of_a_yaml_arrives() -> None:
    config = load_variant(
        zero__stage=3, zero__offload_optimizer="cpu", memory__recompute="layer", memory__loss_tile=64,
        memory__mlp_tile="auto", train__micro_batch=2, deepspeed__zero_optimization={"reduce_bucket_size": 1000},
    ).config  # fmt: skip
    setup = setup_of(config, derive(config, 4), shape_of(config), on_gpu=False)
    assert (setup.stage, setup.offload_optimizer, setup.recompute) == (3, True, "layer")
    assert (setup.loss_tile, setup.mlp_tile, setup.rows, setup.bucket) == (64, 128, 2, 1000)
    assert (setup.ring, setup.data, setup.local, setup.n) == (2, 2, 2048, 4096)


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


def test_the_working_set_of_llama_8b_by_token_and_part() -> None:
    """What grows with a rank's tokens at the peak of a step, with everything that saves memory on: 8 ranks, checkpoints
    on the host, tiles. The figures stand in docs/plan.md; their sum is below the 90 KB that were aimed at."""
    fixed = Setup(
        2**20,
        ring=8,
        recompute="layer_keep_attention",
        offload_checkpoints=True,
        loss_tile=1040,
        mlp_tile=2048,
        recompute_norms=True,
    )
    small, large = (step_bytes(LLAMA_8B, replace(fixed, tokens=tokens)).peak for tokens in (2**21, 2**22))
    assert small.name == large.name and large.name.endswith("attention")
    tokens = 2**21 // 8
    slopes = {part: (large.parts[part] - small.parts.get(part, 0)) // tokens for part in large.parts}
    assert {part: slope for part, slope in slopes.items() if slope} == {
        "saved activations": 8_320,
        "active layer": 20_480,
        "attention buffers": 24_832,
        "ring buffers": 32_768,
        "workspace": 548,
    }
    assert sum(slopes.values()) == 86_948
