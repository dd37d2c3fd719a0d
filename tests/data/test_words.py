"""The table of words gives the ids that the package gives."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.tokenizers.tokenizer import (
    LibraryTokenizer,
)
from longctx.data.words import WordTable, applies

TEXT = st.text(
    st.one_of(st.sampled_from(" \n\t\r'sdlvemt09aZ_-\u00a0\u0085\u2028\x1c\x1f"), st.characters(codec="utf-8"))
)


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_word_table_equals_the_package(bpe: LibraryTokenizer, text: str) -> None:
    assert bpe._words is not None
    assert bpe.encode(text).tolist() == bpe.backend.encode(text, add_special_tokens=False).ids


def test_word_table_equals_the_package_on_real_text(bpe: LibraryTokenizer, sample: list[str]) -> None:
    chosen = sample[::6]
    assert any(not text.isascii() for text in chosen)
    for ours, theirs in zip(bpe.encode_batch(chosen), bpe._encode_batch(chosen), strict=True):
        assert np.array_equal(ours, theirs)


def test_a_word_is_encoded_once() -> None:
    asked: list[str] = []

    def encode(words: list[str]) -> list[np.ndarray]:
        asked.extend(words)
        return [np.array([len(word)], np.uint32) for word in words]

    table = WordTable(encode)  # type: ignore[arg-type]
    assert table.encode("one two one").tolist() == [3, 4, 4] and sorted(asked) == [" one", " two", "one"]
    assert table.encode("two one").tolist() == [3, 4] and asked[3:] == ["two"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("normalizer", {"type": "NFC"}),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("added_tokens", [{"special": False}]),
    ],
)
def test_other_tokenizers_are_left_to_the_package(bpe: LibraryTokenizer, key: str, value: object) -> None:
    content = json.loads(bpe.backend.to_str())
    assert applies(content) and not applies(content | {key: value})
