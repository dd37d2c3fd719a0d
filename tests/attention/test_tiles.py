"""The plan of fused calls: every visible pair in exactly one tile, and as few and as large calls as the masks allow."""

from __future__ import annotations

import pytest
import torch
from attention import dense
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention.band import Kind, Rule, Tile, make_rule, visible
from longctx.attention.mask import BlockMask
from longctx.attention.schedule import work
from longctx.attention.tiles import plan, segments
from longctx.layout import Span, get_layout

LAYOUTS = ("contiguous", "zigzag", "striped")
limits = st.one_of(st.none(), st.integers(0, 80))


def covered(mask: BlockMask, batch: int, rows: int, cols: int) -> torch.Tensor:
    """(B, Tq, Tk) how often the plan computes each pair."""
    times = torch.zeros(batch, rows, cols, dtype=torch.int64)
    for where, tiles in plan(mask, batch):
        for tile in tiles:
            part = torch.ones(tile.q1 - tile.q0, tile.k1 - tile.k0, dtype=torch.int64)
            if tile.kind == Kind.TRIANGLE:
                part = part.tril()
            if tile.kind == Kind.DENSE:
                allowed = mask.row(where.start).tile(*tile[1:])
                part = part * (allowed[0, 0] if isinstance(allowed, torch.Tensor) else allowed)
                assert tile.q1 - tile.q0 <= 512 and tile.k1 - tile.k0 <= 512
            times[where, tile.q0 : tile.q1, tile.k0 : tile.k1] += part
    return times


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(LAYOUTS),
    st.integers(1, 4),
    st.integers(1, 90),
    st.builds(Rule, limits, limits, st.one_of(st.none(), st.integers(1, 300))),
    st.sampled_from(["none", "long", "short", "mixed", "scattered", "alike"]),
    st.integers(0, 2**31),
)
def test_every_visible_pair_is_computed_once(
    layout: str, ring: int, chunk: int, rule: Rule, documents: str, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    length = get_layout(layout).multiple(ring) * chunk
    ids = {
        "none": None,
        "long": torch.randint(-1, 2, (2, length), generator=g).sort(1)[0],
        "short": torch.randint(-1, length // 4 + 1, (2, length), generator=g).sort(1)[0],
        "mixed": (torch.rand(2, length, generator=g).sort(1)[0] ** 3 * 40).long(),
        "scattered": torch.randint(-1, 3, (2, length), generator=g),
        "alike": torch.randint(-1, 5, (1, length), generator=g).sort(1)[0].expand(2, -1),
    }[documents]
    ranks = dense.parts(layout, ring, length)
    rank, source = int(torch.randint(ring, (), generator=g)), int(torch.randint(ring, (), generator=g))
    q_index, k_index = ranks[rank], ranks[source]
    q_ids, k_ids = (None, None) if ids is None else (ids[:, q_index], ids[:, k_index])
    spans = [get_layout(layout).spans(r, ring, length) for r in (rank, source)]
    mask = BlockMask(spans[0], spans[1], rule, q_ids, k_ids)
    allowed = (dense.visible(q_index, k_index, rule) & dense.same_document(q_ids, k_ids))[:, 0].expand(2, -1, -1)
    assert torch.equal(covered(mask, 2, len(q_index), len(k_index)), allowed.long())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 100), st.integers(1, 100), st.integers(0, 100), st.integers(1, 100), st.integers(0, 2**31))
def test_a_tile_of_the_mask_is_the_definition(q0: int, rows: int, k0: int, cols: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    spans = get_layout("zigzag").spans(1, 3, 1200)
    rule = Rule(left=int(torch.randint(1, 500, (), generator=g)), right=0, length=1000)
    ids = torch.randint(-1, 3, (2, 400), generator=g).sort(1)[0]
    index = dense.indices(spans)
    expected = (dense.visible(index, index, rule) & dense.same_document(ids, ids))[..., q0 : q0 + rows, k0 : k0 + cols]
    got = BlockMask(spans, spans, rule, ids, ids).tile(q0, q0 + rows, k0, k0 + cols)
    shape = expected.shape
    got = got.expand(shape) if isinstance(got, torch.Tensor) else torch.full(shape, got)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("ring", [2, 4, 8])
def test_every_step_of_zigzag_causal_is_one_call(ring: int) -> None:
    length = 256 * ring
    c = 128
    blocks = [get_layout("zigzag").spans(rank, ring, length) for rank in range(ring)]
    for rank in range(ring):
        for source in range(ring):
            tiles = plan(BlockMask(blocks[rank], blocks[source], make_rule(True, None)), 1)[0][1]
            expected = {
                0: (Tile(Kind.TRIANGLE, 0, 2 * c, 0, 2 * c),),
                1: (Tile(Kind.FULL, 0, 2 * c, 0, c),),
                -1: (Tile(Kind.FULL, c, 2 * c, 0, 2 * c),),
            }[(rank > source) - (rank < source)]
            assert tiles == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_causal_costs_half_of_full(layout: str) -> None:
    ring, length = 4, 4096
    blocks = [get_layout(layout).spans(rank, ring, length) for rank in range(ring)]
    rule, area = make_rule(True, None), 0.0
    for q in blocks:
        for k in blocks:
            for _, tiles in plan(BlockMask(q, k, rule), 1):
                area += sum((t.q1 - t.q0) * (t.k1 - t.k0) * (0.5 if t.kind == Kind.TRIANGLE else 1) for t in tiles)
    pairs = sum(map(sum, work(layout, ring, length, rule)))
    assert pairs == length * (length + 1) / 2 and area <= pairs * 1.001


def test_long_documents_need_no_mask() -> None:
    ids = (torch.arange(4096) // 300)[None]
    mask = BlockMask((Span(0, 4096),), (Span(0, 4096),), make_rule(True, None), ids, ids)
    tiles = plan(mask, 1)[0][1]
    assert all(tile.kind == Kind.TRIANGLE for tile in tiles) and len(tiles) == 14


def test_short_documents_are_gathered() -> None:
    ids = (torch.arange(4096) // 9)[None]
    found = segments(ids[0], (Span(0, 4096),), None)
    assert all(64 < s.span.count <= 128 for s in found[:-1])
    mask = BlockMask((Span(0, 4096),), (Span(0, 4096),), make_rule(True, None), ids, ids)
    tiles = plan(mask, 1)[0][1]
    assert len(tiles) <= len(found)
    pairs = sum((tile.q1 - tile.q0) * (tile.k1 - tile.k0) for tile in tiles)
    assert pairs <= 128 * 4096 < visible((Span(0, 4096),), (Span(0, 4096),), make_rule(True, None)) / 10


def test_padding_is_in_no_segment() -> None:
    ids = torch.tensor([-1] * 100 + [0] * 100 + [-1] * 3 + [1] * 5 + [-1] * 100)
    found = segments(ids, (Span(0, 308),), None)
    assert [(s.begin, s.span.count) for s in found] == [(100, 100), (203, 5)]
    assert [(s.begin, s.span.count) for s in segments(ids, (Span(0, 308),), 150)] == [(100, 50)]
