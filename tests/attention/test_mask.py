"""BlockMask.tile against visibility pair by pair, over spans, rules and documents."""

from __future__ import annotations

import torch
from attention import dense
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention.band import Rule, make_rule
from longctx.attention.mask import BlockMask
from longctx.layout import Span, get_layout

limits = st.one_of(st.none(), st.integers(0, 20))


@settings(deadline=None, max_examples=150)
@given(
    layout=st.sampled_from(["contiguous", "zigzag", "striped"]),
    ranks=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    rule=st.builds(Rule, limits, limits, st.one_of(st.none(), st.integers(1, 24))),
    documents=st.sampled_from([None, 1, 3]),
    corner=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    seed=st.integers(0, 100),
)
def test_a_tile_is_the_dense_mask(
    layout: str, ranks: tuple[int, int], rule: Rule, documents: int | None, corner: tuple[int, int], seed: int
) -> None:
    q_spans, k_spans = (get_layout(layout).spans(rank, 3, 24) for rank in ranks)
    q_ids = k_ids = None
    if documents is not None:
        g = torch.Generator().manual_seed(seed)
        q_ids, k_ids = (torch.randint(-1, documents, (2, 8), generator=g) for _ in range(2))
    mask = BlockMask(q_spans, k_spans, rule, q_ids, k_ids)
    assert torch.equal(mask.q_index, dense.indices(q_spans)) and torch.equal(mask.k_index, dense.indices(k_spans))
    expected = dense.visible(mask.q_index, mask.k_index, rule) & dense.same_document(q_ids, k_ids)
    q0, k0 = corner
    tile = mask.tile(q0, 8, k0, 8)
    got = tile if isinstance(tile, torch.Tensor) else torch.tensor(tile)
    expected = expected.expand(2, 1, 8, 8)[:, :, q0:, k0:]
    assert torch.equal(got.expand(expected.shape), expected)
    for row in range(2):
        alone = mask.row(row).tile(q0, 8, k0, 8)
        alone = alone if isinstance(alone, torch.Tensor) else torch.tensor(alone)
        assert torch.equal(alone.expand(1, *expected.shape[1:]), expected[row : row + 1])


def test_tiles_that_need_no_mask_have_none() -> None:
    mask = BlockMask((Span(8, 8),), (Span(0, 8),), make_rule(True, None))
    assert mask.tile(0, 8, 0, 8) is True
    assert BlockMask(mask.k_spans, mask.q_spans, mask.rule).tile(0, 8, 0, 8) is False
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    packed = BlockMask(mask.q_spans, mask.k_spans, mask.rule, ids, ids)
    assert packed.tile(0, 4, 0, 4) is True and packed.tile(0, 4, 4, 8) is False
