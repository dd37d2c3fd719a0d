"""Tokenise conversations with the tokenizer's own chat template, and mark the tokens that the loss counts.

The ids of a conversation are those of transformers' ``apply_chat_template`` on all of its messages. Its assistant turns
are what the template puts between ``{% generation %}`` and ``{% endgeneration %}``. For a template without these, turn
i is what rendering messages 0 to i adds to rendering messages 0 to i − 1 with the generation prompt, which must begin
the rendering of all messages.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from longctx.data.sources.document import PAIR, Kind
from longctx.data.tokenizers.kinds import Tokenizer
from longctx.data.words import Tokens
from longctx.errors import DataError

Loss = Literal["all", "completion", "assistant"]
"""Which tokens of a conversation are labels: "all"; "completion": those of the completion, or of the last assistant
turn; "assistant": those of all assistant turns (of a prompt and its completion in plain text: the completion)."""
LOSSES: tuple[Loss, ...] = ("all", "completion", "assistant")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_LONGEST_SPECIAL = 256  # characters at the end of a turn that are searched for the token that ends it
Labels = npt.NDArray[np.bool_]


class Encoded(NamedTuple):
    """The tokens of one conversation."""

    ids: Tokens
    labels: Labels | None
    """(tokens,) for each token whether the loss counts its prediction; None: all"""
    complete: bool
    """no token that ends a document may follow: the template has written what ends the conversation"""


def template_hash(tokenizer: Tokenizer) -> str | None:
    """Return a hash of a tokenizer's chat template (16 hex digits); None if it has none."""
    template = getattr(tokenizer.transformers, "chat_template", None)
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:16] if template else None


class ChatEncoder:
    """Encodes conversations, and prompts with their completions, as records.py writes them.

    Args:
        loss: which tokens are labels.
        parse: special-token strings inside messages become special tokens; otherwise they raise, because a rendered
            conversation is encoded as a whole.
    """

    def __init__(self, tokenizer: Tokenizer, loss: Loss = "assistant", parse: bool = False) -> None:
        self.tokenizer, self.loss, self.parse = tokenizer, loss, parse
        self._theirs = tokenizer.transformers
        template = getattr(self._theirs, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        self._template: str | None = template
        self._marks_turns = bool(template and _GENERATION.search(template))

    def encode(self, text: str, kind: Kind, where: str) -> Encoded:
        """Encode one document of kind "pair" or "chat".

        Args:
            text: the JSON of the record.
            where: the document, for messages.

        Raises:
            DataError: no chat template, a conversation that it rejects, or one whose labels cannot be found.
        """
        record = json.loads(text)
        if kind == PAIR:
            return self._pair(record["prompt"], record["completion"])
        if self._template is None:
            raise DataError(
                f"{where} is a conversation, but data.tokenizer "
                f"{str(self.tokenizer.folder or 'without a folder')!r} has no chat template; give the folder of a "
                "tokenizer with one (chat_template in its tokenizer_config.json, or chat_template.jinja)"
            )
        if not self.parse and self.tokenizer.special.inside(text):
            found = self.tokenizer.special.split(text)[1]
            raise DataError(
                f"{where}: a message holds {found!r}, which its template would turn into that special token; remove "
                "it, or write data.special_tokens: parse to allow that"
            )
        return self._chat(record, where)

    def _pair(self, prompt: str, completion: str) -> Encoded:
        ids, head = self.tokenizer.encode_batch([prompt + completion, prompt], parse=self.parse)
        ids, head = self.tokenizer.document(ids), np.concatenate([np.array(self.tokenizer.prefix, np.uint32), head])
        if self.loss == "all":
            return Encoded(ids, None, False)
        size = min(ids.size, head.size)
        same = ids[:size] == head[:size]
        begin = size if same.all() else int(np.argmin(same))  # a token across the border belongs to the completion
        return Encoded(ids, np.arange(ids.size) >= begin, False)

    def _chat(self, record: dict[str, Any], where: str) -> Encoded:
        messages, marked = record["messages"], self._marks_turns and self.loss == "assistant"
        settings: dict[str, Any] = {"tools": record.get("tools"), **record.get("options", {})}
        if marked:
            found = self._apply(messages, where, settings, tokenize=True, return_dict=True,
                                return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False})  # fmt: skip
            return Encoded(np.array(found["input_ids"], np.uint32), np.array(found["assistant_masks"], bool), True)
        whole = self._apply(messages, where, settings, tokenize=False)
        encoded = self._theirs(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.array(encoded["input_ids"], np.uint32)
        if self.loss == "all":
            return Encoded(ids, None, True)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.loss == "completion" and "prompt" in record:
            spans = [(self._head(messages[: record["prompt"]], whole, where, settings), len(whole))]
        else:
            turns = turns[-1:] if self.loss == "completion" else turns
            spans = [self._turn(messages, number, whole, where, settings) for number in turns]
        return Encoded(ids, _inside(np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2), spans), True)

    def _turn(
        self, messages: list[Any], number: int, whole: str, where: str, settings: dict[str, Any]
    ) -> tuple[int, int]:
        """Return where in the rendered conversation an assistant turn begins and ends."""
        begin = self._head(messages[:number], whole, where, settings) if number else 0
        rendered = whole
        if number + 1 < len(messages):
            rendered = self._apply(messages[: number + 1], where, settings, tokenize=False)
            self._require_begins(whole, rendered, number + 1, where)
        return begin, begin + self._length_of_turn(rendered[begin:])

    def _length_of_turn(self, text: str) -> int:
        """Return the length of a turn without the white space that follows the special token at its end."""
        stripped = text.rstrip()
        ends_with_special = self.tokenizer.special.split(stripped[-_LONGEST_SPECIAL:])[-1] == ""
        return len(stripped if stripped and ends_with_special else text)

    def _head(self, messages: list[Any], whole: str, where: str, settings: dict[str, Any]) -> int:
        """Return the length of the rendered messages with what asks the model for the next turn."""
        continued = messages[-1]["role"] == "assistant"
        asks = {"continue_final_message": True} if continued else {"add_generation_prompt": True}
        rendered = self._apply(messages, where, settings, tokenize=False, **asks)
        self._require_begins(whole, rendered, len(messages), where)
        return len(rendered)

    def _apply(self, messages: list[Any], where: str, settings: dict[str, Any], **asked: Any) -> Any:
        try:
            return self._theirs.apply_chat_template(messages, **settings, **asked)
        except Exception as error:  # a template may raise anything
            raise DataError(
                f"{where}: the chat template of data.tokenizer rejects its first {len(messages)} messages "
                f"({type(error).__name__}: {error}); repair or remove it"
            ) from None

    def _require_begins(self, whole: str, rendered: str, count: int, where: str) -> None:
        if not whole.startswith(rendered):
            raise DataError(
                f"{where}: data.loss {self.loss}: the chat template of data.tokenizer renders the first {count} "
                "messages differently alone than in the whole conversation, so the tokens of its turns cannot be "
                "found; put {% generation %} and {% endgeneration %} around assistant turns in the template, or write "
                "data.loss: all"
            )


def _inside(offsets: npt.NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> Labels:
    """Return for each token whether it has a character of a span; a token on a span's border has.

    Args:
        offsets: (tokens, 2) first and last + 1 character of each token. Tokenizers leave out spaces at either side, so
            that a token of spaces is empty, at the place of its end.
    """
    begins, ends = offsets[:, 0], offsets[:, 1]
    labels = np.zeros(begins.size, bool)
    for first, end in spans:
        labels |= (ends > first) & ((ends <= end) | (begins < end))
    return labels
