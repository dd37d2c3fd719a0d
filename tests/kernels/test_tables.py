"""Block tables against the mask written out pair by pair: nothing visible left out, no mask where one is needed."""

from __future__ import annotations

import torch
from attention import dense
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention.backends.triton import geometry
from longctx.attention.band import Rule
from longctx.kernels.flash.documents import narrow
from longctx.kernels.flash.tables import Geometry, Table, index_table
from longctx.layout import Span, get_layout

CPU = torch.device("cpu")
limits = st.one_of(st.none(), st.integers(0, 40))


@st.composite
def blocks(draw: st.DrawFn) -> tuple[tuple[Span, ...], tuple[Span, ...], Rule]:
    """Queries of one rank against keys of another; or two single spans of any lengths."""
    rule = Rule(draw(limits), draw(limits), draw(st.one_of(st.none(), st.integers(1, 90))))
    if draw(st.booleans()):
        q = Span(draw(st.integers(-20, 60)), draw(st.integers(1, 50)))
        return (q,), (Span(0, draw(st.integers(1, 50))),), rule
    layout, ring, chunk = (
        get_layout(draw(st.sampled_from(("contiguous", "zigzag", "striped")))),
        3,
        draw(st.integers(1, 15)),
    )
    length = layout.multiple(ring) * chunk
    return (
        layout.spans(draw(st.integers(0, 2)), ring, length),
        layout.spans(draw(st.integers(0, 2)), ring, length),
        rule,
    )


def tiles_of(shape: Geometry, table: Table, row: int, allowed: torch.Tensor, step: int) -> None:
    """Check every range of one batch row's table against `allowed` (Tq, Tk); padding rows may be anything."""
    covered = torch.zeros_like(allowed)
    ranges = table.ranges if table.ranges.dim() == 3 else table.ranges[row]
    for header, spans in zip(table.headers.tolist(), ranges.tolist(), strict=True):
        first, _, valid, _ = header
        for first_tile, first_full, end_full, end_tile, low, high, offset, count, _ in spans:
            assert first_tile <= end_tile and (
                first_tile <= first_full <= end_full <= end_tile or first_full == end_full
            )
            for j in range(first_tile, end_tile):
                rows = slice(first, first + valid)
                cols = slice(offset + j * step, offset + min((j + 1) * step, count))
                assert not covered[rows, cols].any(), "a tile met twice"
                covered[rows, cols] = True
                if first_full <= j < end_full:
                    assert (j + 1) * step <= count and allowed[rows, cols].all()
                elif allowed.dim() == 2 and table.ranges.dim() == 3:
                    row_minus_col = torch.arange(valid)[:, None] - torch.arange(j * step, min((j + 1) * step, count))
                    assert torch.equal((row_minus_col >= low) & (row_minus_col <= high), allowed[rows, cols])
    assert not (allowed & ~covered).any(), "a visible pair in no tile"


@settings(max_examples=150)
@given(given=blocks(), tile=st.sampled_from((4, 16)), step=st.sampled_from((4, 8, 16)), swap=st.booleans())
def test_by_index(given: tuple[tuple[Span, ...], tuple[Span, ...], Rule], tile: int, step: int, swap: bool) -> None:
    shape = geometry(*given)
    allowed = dense.visible(dense.indices(given[0]), dense.indices(given[1]), given[2])[0, 0]
    if swap:
        shape, allowed = shape.swapped(), allowed.T
    table = index_table(shape, tile, step, CPU, True)
    tiles_of(shape, table, 0, allowed, step)
    assert int(table.headers[:, 1].sum()) == len(allowed), "with idle tiles every row is somebody's"
    busy = index_table(shape, tile, step, CPU, False)
    tiles_of(shape, busy, 0, allowed, step)
    assert busy.tiles == 0 or bool((busy.ranges[..., 3] > busy.ranges[..., 0]).any(1).all())
    work = (busy.ranges[..., 3] - busy.ranges[..., 0]).sum(1)
    assert torch.equal(work, work.sort(descending=True).values), "most work first"


@settings(max_examples=10)
@given(given=blocks(), seed=st.integers(0, 99), sort=st.booleans(), swap=st.booleans())
def test_by_document(given: tuple[tuple[Span, ...], tuple[Span, ...], Rule], seed: int, sort: bool, swap: bool) -> None:
    shape, g = geometry(*given), torch.Generator().manual_seed(seed)
    q_index, k_index = (dense.indices(spans) for spans in given[:2])
    ids = torch.randint(-1, 3, (2, 200), generator=g)
    if sort:
        ids = ids.sort(1).values
    q_ids, k_ids = ids[:, q_index.clamp(min=0)], ids[:, k_index.clamp(min=0)]
    allowed = (dense.visible(q_index, k_index, given[2]) & dense.same_document(q_ids, k_ids))[:, 0]
    if swap:
        shape, q_ids, k_ids, allowed = shape.swapped(), k_ids, q_ids, allowed.mT
    plain = index_table(shape, 8, 4, CPU, True)
    table = narrow(plain, shape, q_ids.contiguous(), k_ids.contiguous(), 8, 4)
    for row in range(2):
        tiles_of(shape, table, row, allowed[row], 4)
    assert table is plain or bool((table.ranges[..., 0] >= plain.ranges[..., 0]).all())


def test_a_document_of_its_own_needs_no_mask_and_meets_no_other() -> None:
    """Four documents of 64 tokens, tiles of 16: each row tile meets its own document's tiles only."""
    shape = geometry((Span(0, 256),), (Span(0, 256),), Rule(None, 0))
    ids = (torch.arange(256) // 64)[None]
    table = narrow(index_table(shape, 16, 16, CPU, True), shape, ids, ids, 16, 16)
    for (first, *_), ((first_tile, first_full, end_full, end_tile, *_),) in zip(
        table.headers.tolist(), table.ranges[0].tolist(), strict=True
    ):
        own = first // 64 * 4
        assert (first_tile, end_tile) == (own, first // 16 + 1)
        assert end_full - first_full == first // 16 - own and (first_full == first_tile or first_full == end_full)
