"""Peaks of a step: parts add up, more tokens never cost less, and a layer's bytes per token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from longctx.plan.memory import PARTS, peak_bytes, step_bytes
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape

LLAMA_8B = ModelShape(4096, 32, 32, 8, 128, 14336, 128256)


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


def test_what_was_saved_is_freed_once_backward_has_passed_it() -> None:
    """The layer's MLP and norm are done when its attention runs, whether they were saved or recomputed."""
    for recompute, part in (("none", "saved activations"), ("layer", "active layer")):
        setup = Setup(2**17, ring=8, recompute=recompute)  # type: ignore[arg-type]
        moments = {moment.name: moment.parts for moment in step_bytes(LLAMA_8B, setup).moments}
        mlp, attention = (moments[f"backward of the last layer: {what}"][part] for what in ("MLP", "attention"))
        inner = 4 * 2 * LLAMA_8B.inner * setup.n if recompute == "none" else 0
        assert mlp - attention >= inner + 2 * 2 * LLAMA_8B.hidden * setup.n


def test_offloaded_parts_are_on_the_host_instead() -> None:
    plain = Setup(2**17, ring=8, recompute="layer")
    for change, part in (
        ({"offload_optimizer": True}, "optimizer"),
        ({"offload_parameters": True}, "weights"),
        ({"offload_checkpoints": True}, "saved activations"),
    ):
        before, after = (step_bytes(LLAMA_8B, setup) for setup in (plain, replace(plain, **change)))
        assert before.host == {} and list(after.host) == [part] and after.host[part] > 0
        assert after.moments[0].parts.get(part, 0) < before.moments[0].parts[part] / 3
