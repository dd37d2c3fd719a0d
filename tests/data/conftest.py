"""Token files, a corpus and a small BPE for the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longctx.data.sources.text import open_source
from longctx.data.tokenizers.tokenizer import LibraryTokenizer, train_bpe
from longctx.data.tokens.file import TokenFile
from longctx.data.tokens.writer import TokenWriter

HASH = "ab" * 32


@pytest.fixture(scope="session")
def make_tokens(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TokenFile]:
    """Write documents of the given lengths; token number n of the file is ``n % vocabulary``."""

    def make(lengths: list[int], vocabulary_size: int = 2**31, path: Path | None = None) -> TokenFile:
        path = path or tmp_path_factory.mktemp("tokens") / "x.tokens"
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        with TokenWriter(path, vocabulary_size=vocabulary_size, tokenizer_hash=HASH) as writer:
            writer.extend(np.arange(offsets[-1]) % vocabulary_size, offsets)
        return TokenFile(path)

    return make


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(50):
        file = folder / f"{number:02}.txt"
        file.write_text(f"document {number}\n" + "some words of text\n" * (number % 7))
        os.utime(file, (1e9, 1e9))  # long at rest, as real text is
    return folder


@pytest.fixture(scope="session")
def sample() -> list[str]:
    texts = [document.text for document in open_source("python-stdlib").documents()]
    return texts[: len(texts) // 2 : 7]


@pytest.fixture(scope="session")
def bpe(sample: list[str]) -> LibraryTokenizer:
    tokenizer = train_bpe((text[:20_000] for text in sample[:60]), 1500)
    assert isinstance(tokenizer, LibraryTokenizer)
    return tokenizer
