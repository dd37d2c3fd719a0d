"""Documents, and the interface of a source that yields them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, Protocol

Kind = Literal["text", "pair", "chat", "tokens"]
TEXT: Kind = "text"
PAIR: Kind = "pair"
CHAT: Kind = "chat"
TOKENS: Kind = "tokens"


class Document(NamedTuple):
    """One text, or one conversation, and where it came from.

    Attributes:
        name: where it came from.
        pieces: the text in parts, to be read once, before the next document is requested.
        kind: "text"; or "pair" (a prompt and its completion) or "chat" (a conversation): the text is the JSON that
            records.py writes of them; or "tokens": the parts are (n,) uint32 ids.
    """

    name: str
    pieces: Iterable[Any]
    kind: Kind = TEXT

    @property
    def text(self) -> str:
        """Read all pieces and return the text."""
        return "".join(self.pieces)


class LeftOut(NamedTuple):
    """Files without text for the model, and why they are left out."""

    why: str
    files: int
    bytes: int


class Source(Protocol):
    """Something that yields documents, the same ones in the same order each time.

    Attributes:
        name: as the user gave it, for messages.
        skipped: files left out on purpose, by path; complete after all documents were read.
        formats: number of files (or of data sets) read in each format; complete after all documents were read.
    """

    name: str
    skipped: dict[str, LeftOut]
    formats: Counter[str]

    def documents(self) -> Iterator[Document]:
        """Yield every document. Raises: DataError."""
        ...

    def stamp(self) -> list[list[str | int]] | None:
        """Return (path, bytes, modification time) of every file read, or None if unknown."""
        ...
