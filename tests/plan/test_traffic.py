"""Bytes and messages of one rank beside those of its schedule and of plain counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.attention.band import make_rule
from longctx.attention.schedule import make_schedule
from longctx.plan.machines import MACHINES
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape
from longctx.plan.speed import speed_of
from longctx.plan.traffic import Layer, Sent, all_to_all_sent, hops_of, ring_sent, scan_sent
from longctx.plan.work import layer_of, wire_of

LLAMA_8B = ModelShape(4096, 32, 32, 8, 128, 14336, 128256)
H100 = MACHINES["h100"]


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


def test_a_ring_without_windows_by_hand() -> None:
    """Three hops of a block of 8 tokens, 2 key heads of 16, bf16, the first as k, v and ids; four gradients in fp32."""
    layer = Layer(32, 4, 2, 16, ring=4, documents=True)
    kv, gradient = 2 * 8 * 2 * 16 * 2 + 4 * 8, 2 * 8 * 2 * 16 * 4
    assert ring_sent(layer, backward=False) == Sent(3 * kv, 3 + 2)
    assert ring_sent(layer, backward=True) == Sent(3 * kv + 4 * gradient, 3 + 2 + 4)
    assert ring_sent(replace(layer, ring=1), backward=True) == Sent(0, 0)


@pytest.mark.parametrize("lean", [False, True])
def test_an_all_to_all_by_hand(lean: bool) -> None:
    """Two members of 16 tokens and half of the heads each: 64 elements of q per token, 32 of k."""
    layer = Layer(32, 8, 4, 16, ulysses=2)
    q, k = 2 * 16 * 64, 2 * 16 * 32
    assert all_to_all_sent(layer, backward=False) == Sent(q + 2 * k + q, 2)
    again = (q + 2 * k + q) if lean else 0
    assert all_to_all_sent(layer, backward=True, lean=lean) == Sent(q + again + q + 2 * k, 2)


@given(st.integers(2, 20), st.sampled_from(["zigzag", "contiguous"]), st.booleans(), st.booleans())
def test_every_chunk_gets_the_states_of_all_before_it(ring: int, layout: str, backward: bool, large: bool) -> None:
    """Small states are sent to every rank that needs them; large ones take a logarithmic number of messages."""
    state = 1 << 30 if large else 1000
    sent = [scan_sent(layout, ring, state, backward=backward, rank=rank) for rank in range(ring)]
    assert scan_sent(layout, ring, state, backward=backward) == max(sent)
    chunks = [(rank, 2 * ring - 1 - rank) if layout == "zigzag" else (rank,) for rank in range(ring)]
    for rank, one in enumerate(sent):
        if large and ring > 8:
            assert one.bytes == one.messages * state
            assert one.messages <= len(chunks[rank]) * (ring.bit_length() + 1)
            continue
        routes = [
            (source, to) for source in range(ring) for chunk in chunks[source] for to in range(ring)
            if to != source and chunk < max(chunks[to])
        ]  # fmt: skip
        mine = [peers for peers in routes if peers[1 if backward else 0] == rank]  # backward: the reversed routes
        assert one == Sent(len(mine) * state, len(set(mine)))
