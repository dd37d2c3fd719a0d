"""Speed up byte-level BPE several times: encode each distinct word once, then look it up.

The ``tokenizers`` package spends most of its time keeping track of where in the text each token came from, which a
token file does not need. Here ASCII lines (source code and most English) are split into words by the same pattern;
only unseen words, and other lines, are encoded by the package. tests/data verify that the ids are equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint32]
EncodeBatch = Callable[[Sequence[str]], list[Tokens]]

# GPT-2's pattern, restricted to ASCII, where \p{L} is [A-Za-z], \p{N} is [0-9] and both packages agree on \s.
_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
# The pattern always ends a word before white space that follows other characters, so a text may be split there.
_LINE_END = re.compile(r"(?<=\S)(?=\n)")
_MOST_WORDS = 2**19
_AT_ONCE = 2**13


class WordTable:
    """Encodes texts by looking up words.

    Args:
        encode_batch: encodes words not seen before, and lines that are not ASCII.
    """

    def __init__(self, encode_batch: EncodeBatch) -> None:
        self._encode_batch = encode_batch
        self._ids: dict[str, bytes] = {}  # word -> its ids as raw uint32: joined without a Python object per token

    def encode(self, text: str) -> Tokens:
        """Return the (tokens,) uint32 ids of a text."""
        if text.isascii():
            return np.frombuffer(self._ascii(text), dtype=np.uint32)
        parts = ["".join(lines) for _, lines in groupby(_LINE_END.split(text), str.isascii)]
        foreign = iter(self._encode_batch([part for part in parts if not part.isascii()]))
        raw = [self._ascii(part) if part.isascii() else next(foreign).tobytes() for part in parts]
        return np.frombuffer(b"".join(raw), dtype=np.uint32)

    def _ascii(self, text: str) -> bytes:
        words = _WORD.findall(text)
        unseen = list(set(words).difference(self._ids))
        if unseen:
            if len(self._ids) + len(unseen) > _MOST_WORDS:
                self._ids.clear()
                unseen = list(set(words))
            for begin in range(0, len(unseen), _AT_ONCE):  # the package allocates some hundred bytes per word
                words_now = unseen[begin : begin + _AT_ONCE]
                self._ids.update(zip(words_now, (ids.tobytes() for ids in self._encode_batch(words_now)), strict=True))
        return b"".join(map(self._ids.__getitem__, words))


def applies(content: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json is a byte-level BPE that splits text with GPT-2's pattern only."""
    splitter, model = content.get("pre_tokenizer") or {}, content["model"]
    return (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and not content.get("normalizer")
        and splitter.get("type") == "ByteLevel"
        and splitter.get("add_prefix_space") is False
        and splitter.get("use_regex", True) is True
        and all(token.get("special") for token in content.get("added_tokens") or [])
    )
