"""Pieces of a text: nothing is lost, nothing depends on how the text came in, and tokens are those of the whole."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from longctx.data.build import build_tokens
from longctx.data.sources import pieces as module
from longctx.data.sources.pieces import pieces
from longctx.data.tokenizers.tokenizer import load_tokenizer, train_bpe
from longctx.data.tokens.file import TokenFile

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


def test_a_prepended_space_comes_once_per_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE(unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    text = "the cat sat on 12 mats, and it was cold.\n" * 60
    library.train_from_iterator([text], trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "</s>"]))
    content = json.loads(library.to_str()) | {"pre_tokenizer": None}  # as Llama 2's: no token goes on over a space
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "long.txt").write_text(text)
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 200)
    monkeypatch.setattr(module, "_SEARCHED", 60)
    built = build_tokens(tmp_path / "text", str(tmp_path / "tokenizer.json"), tmp_path / "tokens", held_out=0.0)
    with TokenFile(built.train) as file:
        assert file.tokens[:].tolist() == [*tokenizer.encode(text).tolist(), tokenizer.end_of_document]
