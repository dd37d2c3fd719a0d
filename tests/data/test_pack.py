"""Packing puts every token in exactly one row, and best fit cuts only what does not fit."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.pack import PACKINGS, best_fit, longer_than_row, pack
from longctx.errors import DataError

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def offsets_of(lengths: list[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(2, 50), st.sampled_from(PACKINGS))
def test_every_token_is_in_one_row(lengths: list[int], sequence_length: int, method: str) -> None:
    offsets = offsets_of(lengths)
    packed = pack(offsets, sequence_length, method)
    seen = np.zeros(offsets[-1], dtype=int)
    begins = []
    for row in range(packed.rows):
        pieces = packed.pieces(row)
        assert 0 < pieces.fill <= sequence_length and (pieces.lengths > 0).all()
        begins.append(int(pieces.starts[0]))
        for start, length, document in zip(*pieces, strict=True):
            seen[start : start + length] += 1
            assert offsets[document] <= start and start + length <= offsets[document + 1]
            if method == "best_fit" and lengths[document] <= sequence_length:
                assert length == lengths[document]
    assert (seen == 1).all() and begins == sorted(begins)


def naive_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The textbook's: longest first, each into the fullest row with room; returns the rows' loads."""
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        room = [row for row, load in enumerate(loads) if load + length <= capacity]
        if room:
            loads[max(room, key=lambda row: loads[row])] += length
        else:
            loads.append(length)
    return sorted(loads)


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(40, 100))
def test_best_fit_is_the_textbooks(lengths: list[int], capacity: int) -> None:
    row, rows = best_fit(np.array(lengths), capacity)
    loads = np.bincount(row, weights=lengths, minlength=rows)
    assert sorted(loads.astype(int).tolist()) == naive_best_fit(lengths, capacity)


@pytest.mark.parametrize("sequence_length", [512, 2048, 8192])
@pytest.mark.parametrize("spread", [0.5, 1.0, 1.5])
def test_ten_thousand_documents_fill_98_percent(sequence_length: int, spread: float) -> None:
    """Log-normal lengths, the shape of documents in the wild."""
    lengths = np.random.default_rng(0).lognormal(np.log(900), spread, 10_000).astype(np.int64) + 1
    packed = pack(offsets_of(lengths), sequence_length, "best_fit")
    # At 512 most documents are longer than a row: their first pieces are full rows, and the rest packs well.
    assert lengths.sum() / (packed.rows * sequence_length) >= 0.98


def test_a_million_documents_pack_in_seconds() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 10**6).astype(np.int64) + 1
    started = time.process_time()
    packed = pack(offsets_of(lengths), 8192, "best_fit")
    assert time.process_time() - started < 15
    assert lengths.sum() / (packed.rows * 8192) >= 0.999


def test_bad_arguments() -> None:
    with pytest.raises(DataError, match="'first_fit' is unknown; use one of 'concat', 'best_fit'"):
        pack(offsets_of([3]), 4, "first_fit")
    with pytest.raises(DataError, match="at least 2 tokens"):
        pack(offsets_of([3]), 1)
    with pytest.raises(DataError, match="document 1 has 0 tokens"):
        pack(np.array([0, 2, 2, 3]), 4)


@pytest.mark.parametrize("long", ["truncate", "drop"])
def test_documents_longer_than_a_row(long: str) -> None:
    lengths = np.array([3, 25, 10, 11, 1, 40])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    packed = pack(offsets, 10, "best_fit", long)
    pieces = [piece for row in range(packed.rows) for piece in zip(*packed.pieces(row), strict=True)]
    kept = {0: 3, 2: 10, 4: 1} | ({1: 10, 3: 10, 5: 10} if long == "truncate" else {})
    assert {document: length for _, length, document in pieces} == kept and len(pieces) == len(kept)
    assert all(start == offsets[document] for start, _, document in pieces) and packed.tokens == sum(kept.values())
    assert longer_than_row(offsets, 10) == (3, 76, 46)


def test_what_to_do_with_long_documents_is_for_best_fit() -> None:
    for method, long in (("concat", "drop"), ("best_fit", "shrink")):
        with pytest.raises(DataError, match=f"long_documents '{long}' with packing '{method}'"):
            pack(np.array([0, 5]), 4, method, long)
