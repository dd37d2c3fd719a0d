"""Special tokens of a document: those that a tokenizer adds around a text, and special-token strings inside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from longctx.data.words import Tokens

Special = Literal["spell", "parse"]
"""How a string such as ``<|eot|>`` in a document is encoded: "spell": like any other text; "parse": as the special
token of that name."""
CHOICES: tuple[Special, ...] = ("spell", "parse")
COUNT = "special_strings"
"""key of a build's report: how many special-token strings its documents hold"""


class SpecialStrings:
    """Finds the strings of a tokenizer's special tokens in a text.

    Args:
        content: of a tokenizer.json.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        names = [token["content"] for token in content.get("added_tokens") or [] if token.get("special")]
        longest_first = sorted(filter(None, names), key=len, reverse=True)  # a token may begin like another
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def count(self, text: str) -> int:
        """Return the number of special-token strings in a text."""
        return sum(1 for _ in self._pattern.finditer(text)) if self._pattern else 0

    def inside(self, text: str) -> bool:
        """Return whether a text has any."""
        return self._pattern is not None and self._pattern.search(text) is not None

    def split(self, text: str) -> list[str]:
        """Return the text in pieces, every special-token string a piece of its own (the odd places)."""
        if self._pattern is None:
            return [text]
        pieces, begin = [], 0
        for found in self._pattern.finditer(text):
            pieces += [text[begin : found.start()], found.group()]
            begin = found.end()
        return [*pieces, text[begin:]]


def surround(ids: Tokens, prefix: tuple[int, ...], suffix: tuple[int, ...]) -> Tokens:
    """Return (tokens,) ids with a tokenizer's special tokens around them; those already present are not doubled."""
    before = () if tuple(ids[: len(prefix)]) == prefix else prefix
    after = () if suffix and tuple(ids[-len(suffix) :]) == suffix else suffix
    if not before and not after:
        return ids
    return np.concatenate([np.array(before, np.uint32), ids, np.array(after, np.uint32)])


def note(report: Mapping[str, Any], special: str) -> str | None:
    """Return a sentence about the special-token strings of a build, or None if there are none."""
    count = report.get(COUNT, 0)
    if not count:
        return None
    if special == "parse":
        return f"{count:,} special-token strings in the text became special tokens (data.special_tokens: parse)"
    return (
        f"{count:,} special-token strings in the text were encoded as ordinary text (data.special_tokens: spell); "
        "write parse to make each one its special token"
    )
