"""Encode documents in batches and append them to the training or the held-out file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from longctx.data.sources.document import CHAT, PAIR, TOKENS, Document
from longctx.data.survey import Survey
from longctx.data.tokenizers.chat import ChatEncoder
from longctx.data.tokenizers.special import surround
from longctx.data.tokenizers.tokenizer import Tokenizer
from longctx.data.tokens.writer import TokenWriter
from longctx.data.words import Tokens

_BATCH_CHARACTERS = 2**20


@dataclass
class Counts:
    """What was written, and what was not.

    Attributes:
        special: special-token strings in texts.
        conversations: conversations, and prompts with a completion, in the files.
        without_tokens, without_labels: documents in neither file: no token, or none that the loss would count.
        ends: documents in the training and in the held-out file at the end of each source.
    """

    special: int = 0
    conversations: int = 0
    without_tokens: int = 0
    without_labels: int = 0
    ends: list[tuple[int, int]] = field(default_factory=list)


def tokenise(
    survey: Survey,
    encoder: ChatEncoder,
    held_out: npt.NDArray[np.bool_],
    cut: float,
    train: TokenWriter,
    other: TokenWriter,
) -> Counts:
    """Write every document of a survey, with the tokenizer's special tokens around it.

    Memory does not depend on the length of texts; a conversation is encoded as a whole.

    Args:
        encoder: of conversations; texts are encoded with its tokenizer and its ``parse``.
        held_out: (documents,) bool; True: write to ``other``, else to ``train``.
        cut: if above 0, there is one document, a text, and this share at its end is written to ``other``.
    """
    texts = _Texts(survey, encoder.tokenizer, encoder.parse)

    def end_sources(number: int) -> None:
        """Note the ends of the sources that are read when document ``number`` is next."""
        while len(texts.counts.ends) < len(survey.source_ends) and survey.source_ends[len(texts.counts.ends)] <= number:
            texts.flush()
            texts.counts.ends.append((train.document_count, other.document_count))

    for number, document in survey.documents():
        end_sources(number)
        writer, begun = other if held_out[number] else train, False
        if document.kind in (PAIR, CHAT):
            texts.flush()
            _conversation(document, encoder, writer, texts)
            continue
        for behind, piece in _cut(document.pieces, survey.characters, cut):
            if behind and writer is train:
                texts.end(train, document)
                writer, begun = other, False
            if document.kind == TOKENS:
                texts.add_tokens(writer, document.name, piece)
            elif piece:
                texts.add(writer, document.name, encoder.tokenizer.continuation(piece) if begun else piece)
                begun = True
        texts.end(writer, document)
    end_sources(survey.split.size)
    return texts.counts


def _conversation(document: Document, encoder: ChatEncoder, writer: TokenWriter, texts: _Texts) -> None:
    text = document.text
    ids, labels, complete = encoder.encode(text, document.kind, document.name)
    texts.done += len(text.encode())
    texts.report()
    if labels is not None and not labels[1:].any():  # the first token is no label of any other
        texts.counts.without_labels += 1
        return
    texts.counts.conversations += 1
    writer.append(ids, document.name, labels)
    texts.counts.without_tokens += not writer.end_document(document.name, complete=complete)


class _Texts:
    """Encodes pieces of texts in batches, and appends them in order."""

    def __init__(self, survey: Survey, tokenizer: Tokenizer, parse: bool) -> None:
        self.survey, self.tokenizer, self.parse = survey, tokenizer, parse
        self.counts, self.done = Counts(), 0
        self._batch: list[tuple[TokenWriter, str, str]] = []  # a piece without text ends a document
        self._size = 0
        self._held: Tokens | None = None  # last tokens of the current document: it may end with them

    def report(self) -> None:
        self.survey.progress("tokenising", self.done, self.survey.bytes)

    def add(self, writer: TokenWriter, name: str, piece: str) -> None:
        """Add the next piece of a document; no text ends it."""
        self._batch.append((writer, name, piece))
        self._size += len(piece) or 100  # overhead per document
        if piece and self._size >= _BATCH_CHARACTERS:
            self.flush()

    def add_tokens(self, writer: TokenWriter, name: str, ids: Tokens) -> None:
        """Append ids as they are."""
        self.flush()
        writer.append(ids, name)
        self.done += ids.nbytes
        self.report()

    def end(self, writer: TokenWriter, document: Document) -> None:
        """End a document; one of tokens is complete as it is."""
        if document.kind == TOKENS:
            self.counts.without_tokens += not writer.end_document(document.name, complete=True)
        else:
            self.add(writer, document.name, "")

    def flush(self) -> None:
        """Encode and write what was added."""
        if not self._batch:
            return
        tokenizer, counts = self.tokenizer, self.counts
        encoded = iter(tokenizer.encode_batch([piece for _, _, piece in self._batch if piece], parse=self.parse))
        for writer, name, piece in self._batch:
            if piece:
                ids, self.done = next(encoded), self.done + len(piece.encode())
                counts.special += tokenizer.special.count(piece)
                if self._held is not None and self._held.size:
                    writer.append(self._held, name)
                    self._held = ids
                else:
                    self._held = surround(ids, tokenizer.prefix, ()) if ids.size else None
            else:
                if self._held is not None:
                    writer.append(surround(self._held, (), tokenizer.suffix), name)
                self._held = None
                counts.without_tokens += not writer.end_document(name)
        self._size = 0
        self._batch.clear()
        self.report()


def _cut(pieces: Iterable[Any], characters: int, share: float) -> Iterator[tuple[bool, Any]]:
    """Yield (after the cut?, piece), with ``share`` of a document after the cut, which in a text is at a line start."""
    place, seen, behind = round(characters * (1 - share)), 0, False
    for piece in pieces:
        if share and not behind and seen + len(piece) >= place:
            line = piece.rfind("\n", 0, place - seen) + 1 if isinstance(piece, str) else 0
            at = line or max(min(place, characters - 1) - seen, 1)
            yield False, piece[:at]
            piece, behind = piece[at:], True
        yield behind, piece
        seen += len(piece)
