"""Packed documents without causal: every token reads all tokens of its document, on one device and on rings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bounded import direct
from bounded.sums import Sums, expected, sums
from drawn.draw import global_indices
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention import simulate
from longctx.attention.comm import Link, LocalLink
from longctx.bounded.ranks.packed import attend_documents, documents, separate_documents, several
from longctx.bounded.ranks.sequence import LocalTokens, locate
from longctx.errors import AttentionError

from tolerances import tolerance


def local(ids: torch.Tensor | None, link: Any, layout: str = "contiguous", tokens: int = 24) -> LocalTokens:
    return locate(tokens, 2, torch.device("cpu"), mesh=None, layout=layout, document_ids=ids, length=None, link=link)


def test_documents_are_runs_without_padding() -> None:
    ids = direct.packed([[(3, 1), (-1, 1), (3, 2), (5, 1), (3, 1)], [(-1, 6)]])
    assert [(row, tokens.tolist()) for row, tokens in documents(ids)] == [(0, [0, 2, 3]), (0, [4]), (0, [5])]
    assert several(ids) and not several(ids[:, :4]) and not several(None)


@settings(max_examples=20)
@given(st.integers(1, 4), st.sampled_from(["contiguous", "zigzag"]), st.integers(0, 999))
def test_every_token_reads_its_whole_document(ring: int, layout: str, seed: int) -> None:
    x, index = sums(2, 24, 24, seed), [torch.tensor(here) for here in global_indices(layout, ring, 24)]
    ids = direct.random_documents(2, 24, torch.Generator().manual_seed(seed))
    wanted = expected(x, direct.visible(24, direct.numbered(ids), causal=False))
    x = Sums(*(y.masked_fill((ids < 0)[:, None, :, None], torch.nan) for y in (x.q, x.k, x.v)))

    def worker(link: Link) -> torch.Tensor:
        here = index[link.rank]
        mine = Sums(*(y[:, :, here] for y in (x.q, x.k, x.v)))
        return attend_documents(mine, local(ids[:, here], link, layout, len(here)))

    found, _ = simulate.run(ring, worker)
    wanted = wanted.masked_fill((ids < 0)[:, None, :, None], 0.0)
    assert direct.differences([torch.cat(found, 2)[:, :, torch.cat(index).argsort()]], [wanted])[0] <= tolerance("fp64")


def test_when_documents_are_computed_separately() -> None:
    one, two = direct.packed([[(4, 24)], [(4, 24)]]), direct.packed([[(4, 24)], [(4, 20), (5, 4)]])
    ring = SimpleNamespace(ring=2, rank=0)
    for ids, link, queries, state, wanted in (
        (None, LocalLink(), 24, False, False), (one, LocalLink(), 24, True, False), (two, LocalLink(), 24, False, True),
        (one, ring, 24, False, True), (two, ring, 24, True, False), (two, ring, 5, False, False),
    ):  # fmt: skip
        assert separate_documents(local(ids, link), queries, state) == wanted
    with pytest.raises(AttentionError, match="no single state can be given"):
        separate_documents(local(two, LocalLink()), 24, True)
    with pytest.raises(AttentionError, match="document of a query is unknown"):
        separate_documents(local(two, LocalLink()), 5, False)
