"""A survey of given texts, for tests of builds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from longctx.data.sources.document import Document, LeftOut
from longctx.data.survey import Survey


class Texts:
    """A source of given texts, in pieces of ``size`` characters."""

    def __init__(self, texts: list[str], size: int = 5) -> None:
        self.name, self.texts, self.size = "texts", texts, size
        self.skipped: dict[str, LeftOut] = {}
        self.formats: Counter[str] = Counter()

    def documents(self) -> Iterator[Document]:
        for number, text in enumerate(self.texts):
            yield Document(f"d{number}", (text[i : i + self.size] for i in range(0, max(len(text), 1), self.size)))

    def stamp(self) -> None:
        return None


def survey(texts: list[str], size: int = 5, seed: int = 0) -> Survey:
    return Survey([Texts(texts, size)], seed, lambda *_: None)


WORDS = [f"document {number} " * (number % 9 + 1) + "ß" for number in range(60)]
