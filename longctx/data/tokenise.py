"""Encode documents in batches and append them to the training or the held-out file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from longctx.data.survey import Survey
from longctx.data.tokenizers.special import surround
from longctx.data.tokenizers.tokenizer import Tokenizer
from longctx.data.tokens.writer import TokenWriter
from longctx.data.words import Tokens

_BATCH_CHARACTERS = 2**20


def tokenise(
    survey: Survey,
    tokenizer: Tokenizer,
    held_out: npt.NDArray[np.bool_],
    cut: float,
    train: TokenWriter,
    other: TokenWriter,
    parse: bool = False,
) -> tuple[int, int]:
    """Write every document of a survey, with the tokenizer's special tokens around it.

    Memory does not depend on the length of documents.

    Args:
        held_out: (documents,) bool; True: write to ``other``, else to ``train``.
        cut: if above 0, there is one document, and this share at its end is written to ``other``.
        parse: special-token strings in the text become special tokens.

    Returns:
        The number of special-token strings in the text, and of documents that encode to no token: these are in neither
        file.
    """
    batch: list[tuple[TokenWriter, str, str]] = []  # a piece without text ends a document
    held: Tokens | None = None  # last tokens of the current document: it may end with them
    size = done = special = without = 0

    def flush() -> None:
        nonlocal size, done, special, without, held
        encoded = iter(tokenizer.encode_batch([piece for _, _, piece in batch if piece], parse=parse))
        for writer, name, piece in batch:
            if piece:
                ids, special, done = next(encoded), special + tokenizer.special.count(piece), done + len(piece.encode())
                if held is not None and held.size:
                    writer.append(held, name)
                    held = ids
                else:
                    held = surround(ids, tokenizer.prefix, ()) if ids.size else None
            else:
                if held is not None:
                    writer.append(surround(held, (), tokenizer.suffix), name)
                held = None
                without += not writer.end_document(name)
        size = 0
        batch.clear()
        survey.progress("tokenising", done, survey.bytes)

    for number, document in survey.documents():
        writer, begun = other if held_out[number] else train, False
        for behind, piece in _cut(document.pieces, survey.characters, cut):
            if behind and writer is train:
                batch.append((train, document.name, ""))
                writer, begun = other, False
            if piece:
                batch.append((writer, document.name, tokenizer.continuation(piece) if begun else piece))
                size, begun = size + len(piece), True
            if size >= _BATCH_CHARACTERS:
                flush()
        batch.append((writer, document.name, ""))
        size += 100  # overhead per document
    flush()
    return special, without


def _cut(pieces: Iterable[str], characters: int, share: float) -> Iterator[tuple[bool, str]]:
    """Yield (after the cut?, piece); the cut is at a line start, with ``share`` of the text after it."""
    place, seen, behind = round(characters * (1 - share)), 0, False
    for piece in pieces:
        if share and not behind and seen + len(piece) >= place:
            at = piece.rfind("\n", 0, place - seen) + 1 or max(min(place, characters - 1) - seen, 1)
            yield False, piece[:at]
            piece, behind = piece[at:], True
        yield behind, piece
        seen += len(piece)
