"""The survey of a build: counts, hashes, the held-out split and the sample follow from the texts alone."""

from __future__ import annotations

import numpy as np
import pytest

from longctx.errors import DataError

from survey_texts import WORDS, Texts, survey


def test_counts_are_of_utf8_and_blank_documents_are_left_out() -> None:
    seen = survey(["aß", " \n", "", "b"])
    assert (seen.bytes, seen.characters, seen.empty) == (4, 3, 2)
    assert [document.text for _, document in seen.documents()] == ["aß", "b"]


def test_hashes_do_not_depend_on_how_a_text_comes_in() -> None:
    one, other = survey(WORDS, 5), survey(WORDS, 1000)
    assert one.content == other.content and np.array_equal(one.split, other.split)
    assert survey(WORDS[::-1]).content != one.content
    assert not np.array_equal(survey(WORDS, seed=1).split, one.split)


def test_copies_of_a_text_are_on_the_same_side_and_the_share_is_kept() -> None:
    seen = survey(WORDS + WORDS)
    held = seen.held_out(0.25)
    assert np.array_equal(held[:60], held[60:]) and 0.2 <= held.mean() <= 0.3
    assert not seen.held_out(0).any() and not survey(["one"]).held_out(0.5).any()
    with pytest.raises(DataError, match="all 3 documents are the same text"):
        survey(["same"] * 3).held_out(0.5)


def test_the_sample_holds_no_held_out_text_and_stays_within_its_budget() -> None:
    seen = survey(WORDS)
    held = seen.held_out(0.3)
    sample = "".join(seen.training_sample(held, 400))
    assert 0 < len(sample.encode()) <= 510
    assert not any(text in sample for text, out in zip(WORDS, held, strict=True) if out)


@pytest.mark.parametrize("change", ["another", "fewer", "blank"])
def test_text_that_changes_between_two_passes_is_an_error(change: str) -> None:
    seen = survey(["first", "second"])
    texts = {"another": ["first", "2nd"], "fewer": ["first"], "blank": ["first", " "]}[change]
    seen.sources = [Texts(texts)]
    with pytest.raises(DataError, match="changed while|disappeared while"):
        for _, document in seen.documents():
            assert document.text


def test_no_text_at_all_is_named() -> None:
    with pytest.raises(DataError, match="no text in texts .*every document is blank"):
        survey(["", "  "])
