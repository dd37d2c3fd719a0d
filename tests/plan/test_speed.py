"""Step time: overlap as the paper has it, attention by the ring's equations, and no time below the peak."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longctx.plan.machines import MACHINES
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape
from longctx.plan.speed import SMALL, all_to_all, overlap_of, ring_link, ring_pass, speed_of, ulysses_link, world_link

LLAMA_8B = ModelShape(4096, 32, 32, 8, 128, 14336, 128256)
H100 = MACHINES["h100"]


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


@pytest.mark.parametrize("local", [64, 65536])  # the message decides, the computation decides
def test_a_ring_takes_the_longer_of_computation_and_message_at_every_hop(local: int) -> None:
    one = replace(LLAMA_8B, layers=1)
    setup = Setup(8 * local, ring=8)
    pairs = setup.tokens * (setup.tokens + 1) / 2 / 8
    rate = H100.peak * H100.attention * local / (local + SMALL)
    stage = 4 * one.q_width * pairs / rate / 8
    message = H100.latency + (2 * 2 * one.kv_width * local + 4 * local) / H100.link  # keys, values, document ids
    whole, bare = ring_pass(one, setup, H100, backward=False)
    assert bare == pytest.approx(8 * stage)
    assert whole == pytest.approx(7 * max(stage, message) + stage)
    whole, bare = ring_pass(one, setup, H100, backward=True)
    slower, gradient = 2.5 * H100.attention / H100.attention_backward * stage, 2 * 4 * one.kv_width * local / H100.link
    assert bare == pytest.approx(8 * slower)
    assert whole == pytest.approx(7 * max(slower, message + H100.latency + gradient) + slower + gradient)
    assert (message > stage) == (local == 64)


def test_an_all_to_all_moves_all_heads_but_its_own() -> None:
    setup = Setup(2**17, ulysses=8)
    assert all_to_all(LLAMA_8B, replace(setup, ulysses=1), H100) == 0
    bandwidth, latency = ulysses_link(setup, H100)
    sent = 7 / 8 * setup.local * (2 * (2 * LLAMA_8B.q_width + 2 * LLAMA_8B.kv_width) + 4 * 8)
    expected = 2 * latency + sent / bandwidth + 4 * sent / H100.bandwidth
    assert all_to_all(LLAMA_8B, setup, H100) == pytest.approx(expected, rel=1e-3)


def test_links_are_the_networks_from_the_second_node_on() -> None:
    near, far = Setup(2**20, ring=8), Setup(2**20, ring=2, ulysses=8)
    assert ring_link(near, H100) == (H100.link, H100.latency)
    assert ring_link(far, H100) == (H100.network, H100.network_latency)
    assert ulysses_link(far, H100)[0] < H100.link and ulysses_link(replace(far, ulysses=16), H100)[0] < H100.network
    assert world_link(near, H100) == H100.link and world_link(far, H100) == 8 * H100.network
