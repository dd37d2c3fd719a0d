"""Write text while it is generated: a streamer for transformers' generate(), with our tokenizers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from longctx.data.tokenizers.tokenizer import Tokenizer

_LONGEST, _CONTEXT = 64, 8  # tokens
_UNFINISHED = "\ufffd"


class TextStream:
    """Write the text that each new token adds; an incomplete character is written when its last byte arrives."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], Any]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.start = 0  # first token that is decoded again: only the last few can change the text
        self.shown = ""
        self.prompt = True
        self.first: float | None = None
        """time.perf_counter() when the first new token came."""

    def put(self, tokens: Any) -> None:
        """Take the prompt (once, not shown), then new tokens."""
        if self.prompt:
            self.prompt = False
            return
        self.first = time.perf_counter() if self.first is None else self.first
        self.ids += tokens.flatten().tolist()
        text = self.tokenizer.decode(self.ids[self.start :])
        if text.endswith(_UNFINISHED):
            return
        self.write(text[len(self.shown) :])
        self.shown = text
        if len(self.ids) - self.start > _LONGEST:  # decode again only a few known tokens before the new one
            self.start = len(self.ids) - _CONTEXT  # some decoders drop a space before their first token
            self.shown = self.tokenizer.decode(self.ids[self.start :])

    def end(self) -> None:
        """Write the remaining text."""
        text = self.tokenizer.decode(self.ids[self.start :])
        self.write(text[len(self.shown) :])
        self.shown = text
