"""A walk over blocks: how many there are, and inputs that hold 0 at padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.bounded import walk
from longctx.bounded.chunks import Block, Runs


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 300), st.integers(1, 40), st.integers(1, 500))
def test_blocks_are_counted_and_bounded(batch: int, heads: int, tokens: int, chunk: int, rows: int) -> None:
    q = torch.empty(batch, heads, tokens, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "BLOCK_ROWS", rows)
        found = list(walk.blocks_of(q, chunk))
        assert walk.block_count(q, chunk) == len(found)
    assert found[0].start == 0 and found[-1].stop == tokens
    for block in found:
        assert block.chunks == 1 or batch * heads * block.chunks * block.size <= rows


def test_inputs_are_0_at_padding_whatever_it_holds() -> None:
    q, k, v = torch.randn(2, 4, 6, 3), torch.randn(2, 2, 6, 3), torch.randn(2, 2, 6, 5)
    ids, block = torch.tensor([[0, 0, -1, 0, 1, 1], [-1, 4, 4, 4, 4, -1]]), Block(0, 2, 3)
    absent = (ids < 0)[:, None, :, None]
    clean = [x.masked_fill(absent, 0.0) for x in (q, k, v)]
    dirty = walk.ChunkWalk(*(x.masked_fill(absent, torch.nan) for x in (q, k, v)), ids, None)
    masks = dirty.masks(block)
    assert masks.visible.equal(Runs(ids, None).masks(block, torch.float32).visible)
    for found, x in zip(dirty.inputs(block, masks), clean, strict=True):
        assert found.equal(dirty.fold(x, block))


@pytest.mark.parametrize(("dtype", "accumulator"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_masks_of_one_document_are_made_once_per_size(dtype: torch.dtype, accumulator: torch.dtype) -> None:
    x = torch.zeros(1, 1, 9, 2, dtype=dtype)
    plain = walk.ChunkWalk(x, x, x, None, None)
    first, tail = plain.masks(Block(0, 2, 4)), plain.masks(Block(8, 1, 1))
    assert plain.masks(Block(4, 1, 4)) is first and tail.visible.shape == (1, 1)
    assert first.visible.equal(torch.ones(4, 4, dtype=accumulator).tril()) and first.before is None
