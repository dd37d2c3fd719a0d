"""Any rank of a world of 8 to 1,024, in one process: what the real code sends and holds is what the planner says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longctx.bounded.ranks import scan
from longctx.errors import MeshError
from longctx.plan import traffic
from longctx.plan.cluster import Kernel, attention_pass
from longctx.plan.machines import MACHINES
from longctx.plan.traffic import Layer, Sent, all_to_all_sent, ring_sent, scan_sent
from longctx.rehearse.step import Rehearsed, as_rank, rehearse_attention

H100, KERNEL = MACHINES["h100"], Kernel(600e12, 500e12)


def expected(layer: Layer, rank: int, backward: bool) -> Sent:
    """The planner's formulas for one rank."""
    layer = replace(layer, member=rank % layer.ulysses)
    ring = ring_sent(layer, backward=backward, rank=rank // layer.ulysses)
    heads = all_to_all_sent(layer, backward=backward) if layer.ulysses > 1 else Sent(0, 0)
    return Sent(ring.bytes + heads.bytes, ring.messages + heads.messages)


def sent(seen: Rehearsed) -> Sent:
    return Sent(seen.sent.bytes, seen.sent.messages)


GRIDS = [  # ring, ulysses, layout, query heads : key heads, window
    (8, 1, "zigzag", (4, 2), None),
    (8, 1, "contiguous", (4, 2), None),
    (8, 1, "striped", (2, 1), None),
    (8, 1, "zigzag", (2, 1), 10),
    (4, 2, "zigzag", (12, 3), None),  # unequal numbers of query heads a key head: copied before the ring
    (2, 4, "contiguous", (12, 3), None),
    (64, 1, "zigzag", (2, 1), None),
    (64, 1, "zigzag", (2, 1), 21),
    (64, 1, "contiguous", (2, 1), 30),
    (64, 1, "striped", (1, 1), 5),
    (16, 4, "zigzag", (8, 2), None),  # more members than key heads
]


@pytest.mark.parametrize(("ring", "ulysses", "layout", "heads", "window"), GRIDS)
def test_every_byte_and_message_is_foretold(
    ring: int, ulysses: int, layout: str, heads: tuple[int, int], window: int | None
) -> None:
    """By the formulas of `longctx plan`, and by the simulated cluster; at the start, in the middle and at the end."""
    layer = Layer(
        8 * ring * ulysses, *heads, 8, ring, ulysses, layout, itemsize=4, window=window, documents=ulysses == 1
    )
    played = [attention_pass(layer, H100, KERNEL, backward=back) for back in (False, True)]
    for rank in (0, layer.world // 2 - 1, layer.world - 1):
        forward, backward = rehearse_attention(layer, rank)
        assert sent(forward) == expected(layer, rank, backward=False), rank
        assert sent(backward) == expected(layer, rank, backward=True), rank
        if layer.chosen_member == rank % ulysses or heads[1] % ulysses == 0:
            for seen, pass_ in zip((forward, backward), played, strict=True):
                place = rank // ulysses
                assert sent(seen) == (pass_.sent[place], pass_.messages[place]), rank
    most = [ring_sent(layer, backward=back).bytes for back in (False, True)]
    assert all(
        ring_sent(layer, backward=back, rank=r).bytes <= most[back] for back in (False, True) for r in range(ring)
    )


@pytest.mark.parametrize(("ring", "ulysses", "rank"), [(128, 8, 0), (128, 8, 515), (128, 8, 1023)])
def test_a_thousand_ranks(ring: int, ulysses: int, rank: int) -> None:
    layer = Layer(4 * ring * ulysses, 8, 8, 8, ring, ulysses, documents=True, itemsize=2)
    for seen, backward in zip(rehearse_attention(layer, rank), (False, True), strict=True):
        assert sent(seen) == expected(layer, rank, backward)
        played = attention_pass(layer, H100, KERNEL, backward=backward)
        assert sent(seen) == (played.sent[rank // ulysses], played.messages[rank // ulysses])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("window", [None, 40])
def test_a_ring_of_a_thousand_ranks(layout: str, window: int | None) -> None:
    layer = Layer(8 * 1024, 2, 1, 8, 1024, 1, layout, itemsize=4, window=window)
    for rank in (0, 511, 1023):
        for seen, backward in zip(rehearse_attention(layer, rank), (False, True), strict=True):
            assert sent(seen) == expected(layer, rank, backward), rank


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    ("ring", "slots", "ranks"),
    [
        (8, 0, (0, 4, 7)),
        (64, 6, (32,)),
        (1024, 0, (3,)),
        *(pytest.param(ring, slots, (0, ring // 2, ring - 1), marks=pytest.mark.slow)
          for ring in (64, 1024) for slots in (0, 6)),
    ],
)  # fmt: skip
def test_states_of_memories_are_foretold(ring: int, slots: int, ranks: tuple[int, ...], layout: str) -> None:
    layer = Layer(4 * ring, 4, 2, 8, ring, layout=layout, itemsize=4)
    width = slots * (2 * 8 + 1) if slots else 8 * 8
    own, document = 4 * layer.kv_heads * width, 8  # a document's number has no gradient
    for rank in ranks:
        forward, backward = rehearse_attention(layer, rank, slots=slots)
        assert sent(forward) == scan_sent(layout, ring, own + document, backward=False, rank=rank)
        assert sent(backward) == scan_sent(layout, ring, own, backward=True, rank=rank)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_large_states_take_a_logarithm_of_messages(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (traffic.GATHER_RING, traffic.GATHER_BYTES) == (scan._GATHER_RING, scan._GATHER_BYTES)
    monkeypatch.setattr(traffic, "GATHER_BYTES", 0)
    monkeypatch.setattr(scan, "_GATHER_BYTES", 0)
    layer = Layer(4 * 64, 4, 2, 8, 64, layout=layout, itemsize=4)
    own = 4 * 2 * 8 * 8
    for rank in (0, 21, 63):
        forward, backward = rehearse_attention(layer, rank, slots=0)
        assert sent(forward) == scan_sent(layout, 64, own + 8, backward=False, rank=rank)
        assert sent(backward) == scan_sent(layout, 64, own, backward=True, rank=rank)


def test_a_rank_holds_as_much_in_any_world() -> None:
    """The most that a rank holds in attention depends on its own tokens, not on how many share the row."""
    small, large = (rehearse_attention(Layer(64 * ring, 4, 2, 16, ring, itemsize=4), 3) for ring in (8, 64))
    for near, far in zip(small, large, strict=True):
        assert far.peak == pytest.approx(near.peak, rel=0.01)


def test_what_cannot_be_rehearsed_is_refused() -> None:
    with pytest.raises(MeshError, match="0 to 7"), as_rank(8, 8):
        pass
    with as_rank(3, 8), pytest.raises(MeshError, match="new process"), as_rank(0, 8):
        pass
