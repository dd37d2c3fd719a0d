"""Documents to tokens: encodes in batches and appends to the training or the held-out file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from longctx.data.survey import Survey
from longctx.data.tokenizer import Tokenizer
from longctx.data.tokenwriter import TokenWriter

_BATCH_CHARACTERS = 2**20


def tokenise(
    survey: Survey,
    tokenizer: Tokenizer,
    held_out: npt.NDArray[np.bool_],
    cut: float,
    train: TokenWriter,
    other: TokenWriter,
) -> int:
    """Write every document of a survey; memory does not depend on how long they are.

    Args:
        held_out: (documents,) bool: goes to ``other``, the rest to ``train``.
        cut: if above 0 there is one document, and this share at its end goes to ``other``.

    Returns:
        The number of documents for which the tokenizer has no token at all; they are in neither file.
    """
    batch: list[tuple[TokenWriter, str, str]] = []  # a piece without text ends a document
    size = done = without = 0

    def flush() -> None:
        nonlocal size, done, without
        encoded = iter(tokenizer.encode_batch([piece for _, _, piece in batch if piece]))
        for writer, name, piece in batch:
            if piece:
                writer.append(next(encoded), name)
                done += len(piece.encode())
            else:
                without += not writer.end_document(name)
        size = 0
        batch.clear()
        survey.progress("tokenising", done, survey.bytes)

    for number, document in survey.documents():
        writer = other if held_out[number] else train
        for behind, piece in _cut(document.pieces, survey.characters, cut):
            if behind and writer is train:
                batch.append((train, document.name, ""))
                writer = other
            if piece:
                batch.append((writer, document.name, piece))
                size += len(piece)
            if size >= _BATCH_CHARACTERS:
                flush()
        batch.append((writer, document.name, ""))
        size += 100  # what a document takes besides its text
    flush()
    return without


def _cut(pieces: Iterable[str], characters: int, share: float) -> Iterator[tuple[bool, str]]:
    """Yield (whether it is behind the cut, piece); the cut is at a line start, with ``share`` of the text behind it."""
    place, seen, behind = round(characters * (1 - share)), 0, False
    for piece in pieces:
        if share and not behind and seen + len(piece) >= place:
            at = piece.rfind("\n", 0, place - seen) + 1 or max(min(place, characters - 1) - seen, 1)
            yield False, piece[:at]
            piece, behind = piece[at:], True
        yield behind, piece
        seen += len(piece)
