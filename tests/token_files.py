"""A small token file for tests."""

from __future__ import annotations

from pathlib import Path

from longctx.data.tokens.writer import TokenWriter

HASH = "ab" * 32
DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8]]


def write(path: Path, vocabulary_size: int = 100, end_of_document: int | None = None) -> Path:
    with TokenWriter(
        path, vocabulary_size=vocabulary_size, tokenizer_hash=HASH, end_of_document=end_of_document, metadata={"a": 1}
    ) as writer:
        for number, ids in enumerate(DOCUMENTS):
            writer.add(ids, f"näme {number}")
    return path
