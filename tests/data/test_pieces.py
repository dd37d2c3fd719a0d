"""Pieces of a text: nothing is lost, nothing depends on how the text came in, and tokens are those of the whole."""

from __future__ import annotations

import random

import numpy as np
import pytest

from longctx.data import pieces as module
from longctx.data.pieces import pieces
from longctx.data.tokenizer import train_bpe

TEXTS = ("word \n\n  next\n" * 30, "x" * 333, "\n" * 333, " ", "a\n" * 100, "eins zwei, drei!  vier\n" * 40)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text_however_it_came_in(text: str) -> None:
    expected = list(pieces([text], longest=50))
    assert "".join(expected) == text and all(expected) and max(map(len, expected)) <= 50
    draw = random.Random(0)
    for _ in range(20):
        cuts = sorted(draw.randrange(len(text) + 1) for _ in range(9))
        chunks = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert list(pieces(chunks, longest=50)) == expected
    assert list(pieces([])) == [] and list(pieces(["", "a", ""])) == ["a"]


def test_tokens_of_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SEARCHED", 40)
    draw = random.Random(1)
    parts = ["the", " ", " ", "cat", "\n", "it's", "…", "größer", "12", "!", "\t", "語"]
    text = "".join(draw.choice(parts) + draw.choice(["", " "]) for _ in range(4000))
    tokenizer = train_bpe([text], 400)
    for longest in (64, 100, 1000):
        found = list(pieces([text], longest))
        assert len(found) > 3 and "".join(found) == text
        assert np.concatenate(tokenizer.encode_batch(found)).tolist() == tokenizer.encode(text).tolist()
