"""Documents to tokens: encodes in batches and appends to the training or the held-out file."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from longctx.data.survey import Survey
from longctx.data.tokenizer import Tokenizer
from longctx.data.tokenwriter import TokenWriter

_BATCH_BYTES = 4 * 2**20
_PIECE_CHARACTERS = 8 * 2**20


def tokenise(
    survey: Survey,
    tokenizer: Tokenizer,
    held_out: npt.NDArray[np.bool_],
    cut: float,
    train: TokenWriter,
    other: TokenWriter,
    parse: bool = False,
) -> int:
    """Write every document of a survey, with the tokenizer's special tokens around it.

    Args:
        held_out: (documents,) bool: goes to ``other``, the rest to ``train``.
        cut: if above 0 there is one document, and this share at its end goes to ``other``.
        parse: special-token strings in the text become special tokens.

    Returns:
        how many special-token strings the text holds.
    """
    special = 0
    batch: list[tuple[TokenWriter, str, list[str]]] = []
    size = done = 0

    def flush() -> None:
        nonlocal size, done, special
        pieces = [piece for _, _, texts in batch for piece in texts]
        special += sum(map(tokenizer.special.count, pieces))
        encoded = iter(tokenizer.encode_batch(pieces, parse=parse))
        for writer, name, texts in batch:
            ids = np.concatenate([next(encoded) for _ in texts])
            if ids.size:
                writer.add(tokenizer.document(ids), name)
        done += size
        size = 0
        batch.clear()
        survey.progress("tokenising", done, survey.bytes)

    for number, document in survey.documents():
        parts = [(other if held_out[number] else train, document.name, document.text)]
        if cut:  # the only document: its end is held out
            middle = _line_start(document.text, round(len(document.text) * (1 - cut)))
            parts = [(train, document.name, document.text[:middle]), (other, document.name, document.text[middle:])]
        for writer, name, text in parts:
            batch.append((writer, name, _pieces(text)))
        size += int(survey.sizes[number])
        if size >= _BATCH_BYTES:
            flush()
    flush()
    return special


def _pieces(text: str) -> list[str]:
    """Cut a very long text between lines: the package needs some hundred bytes of memory for each token at once."""
    pieces, begin = [], 0
    while len(text) - begin > _PIECE_CHARACTERS:
        end = text.rfind("\n", begin + 1, begin + _PIECE_CHARACTERS)
        while end > begin and text[end - 1].isspace():  # the run of white space stays whole, see words.py
            end -= 1
        end = end if end > begin else begin + _PIECE_CHARACTERS
        pieces.append(text[begin:end])
        begin = end
    return [*pieces, text[begin:]]


def _line_start(text: str, place: int) -> int:
    """Return the last start of a line at or before ``place``, or ``place`` where there is none; inside the text."""
    found = text.rfind("\n", 0, place) + 1
    return found or max(min(place, len(text) - 1), 1)
