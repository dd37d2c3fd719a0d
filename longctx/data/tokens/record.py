"""The record of a build beside its files, and the check that a run's checkpoints may continue with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longctx.data.tokenizers.chat import Loss
from longctx.data.tokenizers.tokenizer import load_tokenizer
from longctx.data.tokens.file import TokenFile
from longctx.errors import DataError

RECORD = "build.json"
TRAIN, HELD_OUT, TOKENIZER = "train.tokens", "held_out.tokens", "tokenizer"
_RECIPE = 3  # increment when the same text and settings would give other files
_TEXT_SETTINGS = {
    "sources": "data.sources",
    "text_field": "data.text_field",
    "format": "data.format",
    "exclude": "data.exclude",
}
_CHAT_SETTINGS = {"loss": "data.loss", "chat_template": "the chat template of data.tokenizer"}
_OTHER_SETTINGS = {
    "seed": "data.seed",
    "tokenizer": "data.tokenizer",
    "vocabulary_size": "data.vocab_size",
    "held_out": "data.held_out",
    "sample_bytes": "data.sample_bytes",
    "special_tokens": "data.special_tokens",
}


@dataclass(frozen=True)
class Settings:
    """The settings that decide a build's files besides the text.

    Attributes:
        tokenizer: its hash, or "bpe" to train one.
        loss, chat_template: of conversations; they are no part of the key of texts.
    """

    tokenizer: str
    vocabulary_size: int | None
    held_out: float
    seed: int
    sample_bytes: int | None
    special_tokens: str
    sources: list[str]
    text_field: str
    format: str
    exclude: list[str]
    recipe: int = _RECIPE
    loss: Loss = "assistant"
    chat_template: str | None = None

    def key(self, content: str, conversations: bool = False) -> str:
        """Return the key of a build from documents of this hash; it does not depend on where they are stored.

        Args:
            conversations: there is a document that is no text.
        """
        without = _TEXT_SETTINGS if conversations else _TEXT_SETTINGS | _CHAT_SETTINGS
        named = {name: value for name, value in asdict(self).items() if name not in without}
        return hashlib.sha256(json.dumps({**named, "content": content}, sort_keys=True).encode()).hexdigest()


def recorded(folder: Path) -> dict[str, Any] | None:
    """Return the record of a complete build whose files are all there and unchanged, or None."""
    try:
        found: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
        for name, identity in found["files"].items():
            if name not in (TRAIN, HELD_OUT):
                return None
            with TokenFile(folder / name, tokenizer_hash=found["tokenizer_hash"]) as file:
                if file.identity != identity:
                    return None
                file.verify()
        if load_tokenizer(folder / TOKENIZER).hash != found["tokenizer_hash"]:
            return None
        return found if {"key", "settings", "stamp", "report", "vocabulary_size"} <= found.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # DataError is a ValueError
        return None


def require_settings(continues: Mapping[str, Any], settings: Settings) -> None:
    """Raise DataError, naming the key, if a run's checkpoints would continue with data of other settings.

    Args:
        continues: the record (``TokenBuild.record``) of the data that the checkpoints were trained on.
    """
    now = asdict(settings)
    for name, key in _OTHER_SETTINGS.items():
        before = continues["settings"].get(name)
        if before != now[name]:
            shown = (f"{str(value)[:12]}" if name == "tokenizer" else value for value in (before, now[name]))
            raise DataError(
                "{}: the checkpoints of this run were saved with {} {}, this run has {}: set it back, or choose "
                "another output.folder".format(key, key, *shown)
            )
    if continues["settings"].get("recipe") != settings.recipe:
        raise DataError(
            "data.sources: the checkpoints of this run were trained on token files of another longctx version, and "
            "this version would build different ones from the same text; give their folder as data.sources, or choose "
            "another output.folder"
        )


def require_text(continues: Mapping[str, Any], settings: Settings, key: str) -> None:
    """Raise DataError if a run's checkpoints would continue with data built from other text.

    Args:
        continues: as in ``require_settings``, which was called before.
        key: of the requested build.
    """
    if continues["key"] == key:
        return
    now, before = asdict(settings), continues["settings"]
    changed = [
        f"{yaml} was {before.get(name)}, now {now[name]}"
        for name, yaml in (_TEXT_SETTINGS | _CHAT_SETTINGS).items()
        if before.get(name, now[name] if name in _CHAT_SETTINGS else None) != now[name]
    ]
    why = "; ".join(changed) or "files were changed, added or removed"
    raise DataError(
        f"data.sources: the text is not the one that the checkpoints of this run were trained on ({why}); restore it, "
        "give the folder of the token files themselves as data.sources, or choose another output.folder"
    )
