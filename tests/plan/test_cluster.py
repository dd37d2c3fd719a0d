"""The simulated cluster: bytes and messages equal the formulas and what the code sends; times are plausible."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import pytest
import torch

from benchmarks import published
from longctx.attention import comm
from longctx.attention.backends.base import BackwardQueries
from longctx.attention.backends.choose import choose_backend
from longctx.attention.band import make_rule
from longctx.attention.comm import LoopbackLink
from longctx.attention.passes import Passes
from longctx.attention.scores import Scores
from longctx.plan.cluster import Kernel, attention_pass, gathered_pass, rate_of, scan_pass
from longctx.plan.machines import MACHINES
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape
from longctx.plan.speed import ring_pass
from longctx.plan.traffic import Layer, all_to_all_sent
from longctx.plan.work import wire_of

H100 = MACHINES["h100"]
KERNEL = Kernel(600e12, 500e12)
ONE_LAYER = ModelShape(4096, 1, 32, 8, 128, 14336, 32000)


def layer_of(devices: int, ulysses: int = 1, layout: str = "zigzag", local: int = 8192) -> Layer:
    return Layer(local * devices, 32, 8, 128, ring=devices // ulysses, ulysses=ulysses, layout=layout)


@pytest.mark.parametrize(("devices", "ulysses"), [(8, 1), (64, 1), (64, 8), (256, 8), (1024, 8), (16, 16)])
def test_bytes_are_those_of_the_formulas(devices: int, ulysses: int) -> None:
    layer = replace(layer_of(devices, ulysses), documents=True)
    setup = Setup(layer.tokens, ring=layer.ring, ulysses=ulysses, recompute="none")
    wire = wire_of(ONE_LAYER, setup)
    forward, backward = (attention_pass(layer, H100, KERNEL, backward=b) for b in (False, True))
    exchanged = [all_to_all_sent(layer, backward=back).bytes for back in (False, True)]
    assert sum(exchanged) == wire.ulysses
    assert set(forward.sent) == {wire.ring_forward + exchanged[0]}
    assert set(backward.sent) == {wire.ring_backward + exchanged[1]}


@pytest.mark.parametrize(("layout", "ring"), [("zigzag", 8), ("striped", 8), ("zigzag", 5)])
def test_bytes_and_messages_are_those_that_the_ring_sends(layout: str, ring: int) -> None:
    """The real passes of rank 0 over a link to itself; every rank of these rings sends as much."""
    tokens, heads, kv_heads, dim = 64, 4, 2, 16
    q, dout = (torch.randn(1, heads, tokens, dim) for _ in range(2))
    k, v = (torch.randn(1, kv_heads, tokens, dim) for _ in range(2))
    scores, rule = Scores(0.25), make_rule(True, None)
    passes = Passes(LoopbackLink(ring), layout, rule, scores, choose_backend("aten", q, v, scores))
    layer = Layer(tokens * ring, heads, kv_heads, dim, ring=ring, layout=layout, itemsize=4)
    comm.counters.reset()
    out, lse = passes.forward(q, k, v, None)
    played = attention_pass(layer, H100, KERNEL)
    assert (comm.counters.bytes, comm.counters.messages) == (played.sent[0], played.messages[0])
    comm.counters.reset()
    passes.backward(BackwardQueries(q, out, lse, dout, None), k, v, None)
    played = attention_pass(layer, H100, KERNEL, backward=True)
    assert (comm.counters.bytes, comm.counters.messages) == (played.sent[0], played.messages[0])


@pytest.mark.parametrize("backward", [False, True])
def test_event_by_event_is_the_closed_form(backward: bool) -> None:
    """What `longctx plan` prints, stage by stage in closed form, beside the simulation of every message."""
    machine = replace(H100, attention=KERNEL.forward / H100.peak, attention_backward=KERNEL.backward / H100.peak)
    for devices, local in ((8, 8192), (64, 16384), (64, 2048)):
        layer = layer_of(devices, local=local)
        closed, _ = ring_pass(ONE_LAYER, Setup(layer.tokens, ring=devices), machine, backward=backward)
        played = attention_pass(layer, machine, KERNEL, backward=backward).seconds
        assert played == pytest.approx(closed, rel=0.1), (devices, local)


def test_zigzag_is_balanced_and_contiguous_is_not() -> None:
    zigzag, contiguous = (
        attention_pass(layer_of(32, layout=layout), H100, KERNEL) for layout in ("zigzag", "contiguous")
    )
    assert max(zigzag.busy) == pytest.approx(sum(zigzag.busy) / 32)
    assert max(contiguous.busy) == pytest.approx(sum(contiguous.busy) / 32 * (2 * 32 - 1) / 32, rel=0.05)
    assert contiguous.seconds > 1.5 * zigzag.seconds


def test_messages_hide_where_tokens_suffice() -> None:
    long, short = (attention_pass(layer_of(64, local=local), H100, KERNEL) for local in (32768, 1024))
    assert long.exposed < 0.05 < short.exposed
    hybrid, flat = (rate_of(layer_of(128, u, local=2048), attention_pass, H100, KERNEL, False) for u in (8, 1))
    assert hybrid > 1.5 * flat, "below the threshold of the network only a ring over nodes holds"


def test_a_memory_costs_the_same_message_at_any_length() -> None:
    small, large = (scan_pass(devices, 2**20, H100, 1e-3) for devices in (8, 1024))
    assert small.messages == [1] * 8 and large.sent[0] == 1023 * 2**20
    assert large.seconds < 0.05
    assert gathered_pass(layer_of(8), H100, KERNEL).sent[0] == 7 * 2 * 8192 * 8 * 128 * 2


def test_published_numbers_are_met() -> None:
    errors = [abs(row.error) for row in published.rows()]
    assert len(errors) > 50 and median(errors) <= published.LIMIT
    assert max(errors) < 0.35, "the worst is a striped ring of FlashAttention-2, whose two halves are two launches"
