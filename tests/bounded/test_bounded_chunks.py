"""Blocks of chunks cover a sequence once, and packed documents give the masks and counts of a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from bounded import direct
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.bounded import chunks
from longctx.bounded.chunks import Block, Runs, blocks

LENGTH = 24
before_states = st.sampled_from([None, (0, 0), (-1, 1), (2, 3)])


def draw(seed: int, document: tuple[int, int] | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ids (2, 24), some of which continue the documents before them, and those documents."""
    ids = torch.randint(-1, 3, (2, LENGTH // 3), generator=torch.Generator().manual_seed(seed)).repeat_interleave(3, 1)
    return ids, None if document is None else torch.tensor(document)


def numbered(ids: torch.Tensor, document: torch.Tensor | None) -> list[list[int]]:
    """Number each row's documents by a loop: 0 continues the document before, -1 is padding."""
    rows = []
    for row, names in enumerate(ids.tolist()):
        number, last, found = 0, -1 if document is None else int(document[row]), []
        for name in names:
            number += name not in (-1, last)
            last = last if name == -1 else name
            found.append(-1 if name == -1 else number)
        rows.append(found)
    return rows


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 5))
def test_blocks_cover_every_token_once(tokens: int, size: int, count: int) -> None:
    found = list(blocks(tokens, size, count))
    assert [t for block in found for t in range(block.start, block.stop)] == list(range(tokens))
    assert all(block.chunks <= count and block.size <= size for block in found)
    for block in found:
        if block.chunks * block.size > 1:
            first, second = block.halves()
            assert (first.start, first.stop, second.stop) == (block.start, second.start, block.stop)


def test_fold_puts_the_tokens_of_a_chunk_and_the_heads_of_a_group_together() -> None:
    x, block = torch.randn(2, 6, 11, 3), Block(2, 4, 2)
    part = chunks.fold(x, block, 3, torch.float64)
    assert part.shape == (2, 3, 4, 2 * 2, 3) and part.dtype == torch.float64
    for group, chunk, head, token in ((0, 0, 0, 0), (2, 3, 1, 1), (1, 2, 1, 0)):
        there = x[:, 2 * group + head, 2 + 2 * chunk + token]
        assert part[:, group, chunk, 2 * head + token].equal(there.double())
    out = torch.zeros_like(x)
    chunks.unfold(out, block, part)
    assert out[:, :, 2:10].equal(x[:, :, 2:10]) and not out[:, :, :2].any() and not out[:, :, 10:].any()


def test_pieces_cover_a_long_sequence_with_its_padding() -> None:
    tokens = torch.rand(2, 5000) > 0.5
    found = list(chunks.pieces(5000, tokens))
    assert [(here.start, min(here.stop, 5000)) for here, _ in found] == [(0, 2048), (2048, 4096), (4096, 5000)]
    assert torch.cat([absent for _, absent in found if absent is not None], 2)[:, 0, :, 0].equal(~tokens)
    assert all(absent is None for _, absent in chunks.pieces(5000, None))


@settings(max_examples=20)
@given(st.integers(0, 999), before_states)
def test_documents_are_runs_of_one_id(seed: int, document: tuple[int, int] | None) -> None:
    ids, before = draw(seed, document)
    runs, rows = Runs(ids, before), torch.tensor(numbered(ids, before))
    last = rows.amax(1).clamp_min(0)
    assert runs.ids.equal(rows)
    assert runs.head().equal(rows == 1) and runs.before().equal(rows == 0)
    assert runs.tail().equal((rows == last[:, None]) & (rows >= 0))
    assert runs.single.equal(last <= 1)
    named = torch.cat([torch.full((2, 1), -1) if before is None else before[:, None], ids], 1)
    latest = torch.tensor([next((name for name in row[:0:-1] if name >= 0), row[0]) for row in named.tolist()])
    assert runs.document.equal(latest)
    assert runs.ending.equal(torch.where((last <= 1) | (latest < 0), latest, -2 - latest))
    for size in (5, 24):
        ends = [min(end, LENGTH) for end in range(0, LENGTH + size, size)]
        wanted = [[max([0, *row[:end]]) for end in ends] for row in rows.tolist()]
        assert runs.edges(size).tolist() == wanted


@settings(max_examples=20)
@given(st.integers(0, 999), before_states, st.sampled_from([None, (5, 9)]))
def test_counts_continue_those_of_the_state(
    seed: int, document: tuple[int, int] | None, count: tuple[int, int] | None
) -> None:
    ids, before = draw(seed, document)
    found = Runs(ids, before).counts(None if count is None else torch.tensor(count))
    for row, own in enumerate(numbered(ids, before)):
        for t, name in enumerate(own):
            carried = count[row] if name == 0 and count is not None else 0
            if name >= 0:
                assert int(found[row, t]) == carried + own[: t + 1].count(name)


@settings(max_examples=20)
@given(st.integers(0, 999), before_states)
def test_masks_let_tokens_of_one_document_meet(seed: int, document: tuple[int, int] | None) -> None:
    ids, before = draw(seed, document)
    block, rows = Block(4, 3, 5), numbered(ids, before)
    masks = Runs(ids, before).masks(block, torch.float64)
    assert masks.before is not None and masks.after is not None and masks.kept is not None and masks.valid is not None
    for row, own in enumerate(rows):
        latest = [max([0, *own[:t]]) for t in range(LENGTH + 1)]  # the document of the state before token t
        for chunk in range(3):
            start, stop = 4 + 5 * chunk, 9 + 5 * chunk
            tokens = own[start:stop]
            pairs = [[float(a == b >= 0 and j <= t) for j, b in enumerate(tokens)] for t, a in enumerate(tokens)]
            assert masks.visible[row, 0, chunk].tolist() == pairs
            assert masks.before[row, 0, chunk, :, 0].tolist() == [float(a == latest[start]) for a in tokens]
            assert masks.after[row, 0, chunk, :, 0].tolist() == [float(a == latest[stop]) for a in tokens]
            assert masks.kept[row, 0, chunk].item() == (latest[start] == latest[stop])
            assert masks.valid[row, 0, chunk, :, 0].tolist() == [a >= 0 for a in tokens]


@pytest.mark.parametrize("packed", [False, True])
def test_masked_products(packed: bool) -> None:
    """Against masks expanded to every row; 2 query heads per group, so 10 rows per chunk of 5 tokens."""
    masks = chunks.causal_masks(5, torch.float64, torch.device("cpu"))
    if packed:
        masks = Runs(*draw(3, (0, 1))).masks(Block(4, 3, 5), torch.float64)
    visible = masks.visible.repeat(*[1] * (masks.visible.dim() - 2), 2, 1)
    before = torch.ones(()) if masks.before is None else masks.before.repeat(1, 1, 1, 2, 1)
    after = torch.ones(()) if masks.after is None else masks.after
    scores, x, state = (torch.randn(2, 1, 3, *shape).double() for shape in ((10, 5), (10, 4), (4, 6)))
    out, written, tokens = (torch.randn(2, 1, 3, *shape).double() for shape in ((10, 6), (5, 6), (5, 4)))
    found = [
        masks.mask_pairs(scores.clone()), masks.mask_rows(x), masks.add_read(out.clone(), x, state),
        masks.add_written(written.clone(), tokens, state),
    ]  # fmt: skip
    wanted = [scores * visible, x * before, out + before * (x @ state), written + after * (tokens @ state)]
    assert max(direct.differences(found, wanted)) <= 1e-12
