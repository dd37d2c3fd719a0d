"""Where a rank's tokens lie in the sequence, their documents, and how many tokens of a document precede each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bounded import direct
from drawn.draw import global_indices
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention import simulate
from longctx.attention.comm import Link, LocalLink
from longctx.bounded.ranks.sequence import LocalTokens, check_one_document, locate, only_document
from longctx.errors import AttentionError

CPU = torch.device("cpu")


def at(
    link: Any, layout: str, tokens: int, ids: torch.Tensor | None = None, length: int | None = None, mesh: Any = None
) -> LocalTokens:
    return locate(tokens, 2, CPU, mesh=mesh, layout=layout, document_ids=ids, length=length, link=link)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ring", [1, 2, 3])
def test_global_indices_and_padding_beyond_the_length(layout: str, ring: int) -> None:
    tokens = 4 if layout == "zigzag" else 3
    for rank, here in enumerate(global_indices(layout, ring, ring * tokens)):
        link = SimpleNamespace(ring=ring, rank=rank)
        local = at(link, layout, tokens)
        assert local.index.tolist() == here and local.ids is None and local.valid is None
        assert [i for part in local.parts for i in range(tokens)[part]] == list(range(tokens))
        for part in local.parts:  # contiguous stretches of the sequence
            assert local.index[part].diff().eq(1).all()
        length = ring * tokens - 1
        padded = at(link, layout, tokens, None, length)
        assert padded.ids is not None and padded.valid is not None
        assert padded.valid.tolist() == [[i < length for i in here]] * 2
        assert at(link, layout, tokens, None, ring * tokens).ids is None


@settings(max_examples=20)
@given(st.integers(1, 4), st.sampled_from(["contiguous", "zigzag"]), st.booleans(), st.booleans(), st.integers(0, 999))
def test_counts_are_those_of_one_device(ring: int, layout: str, packed: bool, after: bool, seed: int) -> None:
    """With a state before the sequence: its count goes to the first document if that has the state's id."""
    start, length = 4 if after else 0, 24
    before: Any = (None, None)
    ids = direct.random_documents(2, start + length, torch.Generator().manual_seed(seed)) if packed else None
    wanted = direct.counts(direct.visible(start + length, None if ids is None else direct.numbered(ids))).expand(2, -1)
    if after:
        count, document = wanted[:, 3], None
        if ids is not None:
            latest = ((ids[:, :4] >= 0).long() * torch.arange(1, 5)).argmax(1, keepdim=True)
            count, document = wanted.gather(1, latest)[:, 0], ids.gather(1, latest)[:, 0]
        before = count, document
    ids, wanted = None if ids is None else ids[:, start:], wanted[:, start:]
    index = [torch.tensor(here) for here in global_indices(layout, ring, length)]

    def worker(link: Link) -> tuple[torch.Tensor, torch.Tensor]:
        here = index[link.rank]
        return at(link, layout, len(here), None if ids is None else ids[:, here]).counts(*before, total=True)

    for here, (found, last) in zip(index, simulate.run(ring, worker)[0], strict=True):
        found = found.expand(2, -1)
        valid = torch.ones_like(found, dtype=torch.bool) if ids is None else ids[:, here] >= 0
        assert found[valid].equal(wanted[:, here][valid])
        for row in range(2):
            there = range(length) if ids is None else (ids[row] >= 0).nonzero()[:, 0].tolist()
            if there:
                assert int(last.expand(2)[row]) == int(wanted[row, there[-1]])


def test_the_last_document_of_a_stretch() -> None:
    local = at(LocalLink(), "contiguous", 6, direct.packed([[(3, 2), (5, 3), (-1, 1)], [(7, 6)]]))
    tokens, document = local.tail(slice(0, 6), 2)
    assert tokens is not None and tokens.tolist() == [[False, False, True, True, True, False], [True] * 6]
    assert document.tolist() == [-2 - 5, 7]  # document 5 began within the stretch
    plain = at(LocalLink(), "contiguous", 6)
    assert plain.tail(slice(0, 6), 2)[0] is None and plain.tail(slice(0, 6), 2)[1].tolist() == [0, 0]
    assert local.document_before(torch.tensor([1, 2]), 2).tolist() == [1, 2]
    assert plain.document_before(torch.tensor([1, 2]), 2).tolist() == [0, 0]


def test_one_document_per_row_is_checked_over_all_ranks() -> None:
    one = direct.packed([[(-1, 2), (4, 2)], [(-1, 4)], [(4, 1), (6, 3)]])
    found = only_document(one, 3, CPU)
    assert found.tolist() == [4, -1, -2] and only_document(None, 3, CPU).tolist() == [0, 0, 0]
    check_one_document([found[:2], torch.tensor([-1, 9])])
    for other in (found[[2, 1]], torch.tensor([5, -1])):
        with pytest.raises(AttentionError, match="one state per document"):
            check_one_document([found[:2], other])


def test_sequences_that_do_not_fit_are_refused() -> None:
    ring = SimpleNamespace(ring=3, rank=0)
    for message, arguments in {
        "use Mesh\\(ring=4\\)": (None, "zigzag", 4, None, None, SimpleNamespace(ulysses_size=2, sequence_size=4)),
        "interleaves tokens": (ring, "striped", 4),
        "needs a multiple of 6": (ring, "zigzag", 3),
        "the true global length, 1 to 12": (ring, "zigzag", 4, None, 13),
    }.items():
        with pytest.raises(AttentionError, match=message):
            at(*arguments)
