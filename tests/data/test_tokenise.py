"""Documents to token files: what the tokenizer gives for each whole text, however it is batched and cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longctx.data import tokenise as module
from longctx.data.tokenise import tokenise
from longctx.data.tokenizers.chat import ChatEncoder
from longctx.data.tokenizers.tokenizer import ByteTokenizer
from longctx.data.tokens.file import TokenFile
from longctx.data.tokens.writer import TokenWriter

from survey_texts import WORDS, survey


def written(
    tmp_path: Path, texts: list[str], held: list[bool], cut: float = 0.0, size: int = 5
) -> tuple[list[str], list[str]]:
    """The texts of both files."""
    bytes_, both = ByteTokenizer(), []
    settings = {"vocabulary_size": bytes_.vocabulary_size, "tokenizer_hash": bytes_.hash}
    for name in ("train", "other"):
        both.append(TokenWriter(tmp_path / name, end_of_document=bytes_.end_of_document, **settings))  # type: ignore[arg-type]
    with both[0] as train, both[1] as other:
        tokenise(survey(texts, size), ChatEncoder(bytes_), np.array(held), cut, train, other)
    found = []
    for name in ("train", "other"):
        with TokenFile(tmp_path / name) as file:
            found.append([bytes_.decode(file.document(i)[:-1]) for i in range(file.document_count)])
    return found[0], found[1]


@pytest.mark.parametrize("batch", [1, 50, 2**20])
def test_every_document_is_whole_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", batch)
    held = [number % 4 == 0 for number in range(len(WORDS))]
    train, other = written(tmp_path, WORDS, held)
    assert train == [text for text, out in zip(WORDS, held, strict=True) if not out]
    assert other == [text for text, out in zip(WORDS, held, strict=True) if out]


def test_a_single_document_is_split_at_a_line_start(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(100))
    (train,), (other,) = written(tmp_path, [text], [False], cut=0.2, size=400)
    assert train + other == text and train.endswith("\n") and 0.15 < len(other) / len(text) < 0.25
