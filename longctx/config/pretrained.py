"""Check a pretrained folder and its tokenizer, without torch and before the model is built."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from longctx.config.findings import Finding, Rule
from longctx.config.lora_rules import lora_modules, lora_package
from longctx.config.problems import show
from longctx.config.rope_rules import of_the_model
from longctx.config.schema import RunConfig
from longctx.data.tokenizers.file import NAME, read_tokenizer_file, tokenizer_file, vocabulary_size_in
from longctx.errors import DataError, LongctxError, ModelError
from longctx.models.load.classes import require_causal
from longctx.models.load.expected import mismatches
from longctx.models.load.headers import Weight, read_weights
from longctx.models.load.reach import reach_of
from longctx.models.load.rope import rope_of
from longctx.models.load.settings import read_settings, text_settings, whole_number

_SHOWN = 4
_KEY = "model.pretrained"


def pretrained_findings(config: RunConfig) -> Iterator[Finding]:
    """Yield what is missing, damaged or unsuitable in a run's pretrained folder: config.json, weights, positions."""
    if config.model.pretrained is None:
        return
    folder = Path(config.model.pretrained)
    if not folder.is_dir():
        yield Finding(_KEY, f"{str(folder)!r} is not a folder here; models are read from local folders only", "no-file")
        return
    try:
        settings = read_settings(folder)
        require_causal(settings, str(folder))
    except ModelError as problem:
        yield Finding(_KEY, str(problem), "pretrained")
        return
    weights: dict[str, Weight] = {}
    try:
        weights = read_weights(folder)
    except ModelError as problem:
        yield Finding(_KEY, str(problem), "pretrained")
    else:
        yield from _unfit(settings, weights, folder)
    yield from _too_long(config, settings, weights)


def tokenizer_findings(config: RunConfig) -> Iterator[Finding]:
    """Yield what is wrong with a run's tokenizer: missing, damaged, or not the pretrained model's."""
    name, folder = config.data.tokenizer, config.model.pretrained
    size = 257
    content: dict[str, Any] | None = None
    if name not in ("bpe", "bytes"):
        try:
            file = tokenizer_file(name)
            content = read_tokenizer_file(file)
            size = vocabulary_size_in(file.parent, content)
        except DataError as problem:
            own = f"{_KEY} has no tokenizer of its own that can be read; " if name == folder else ""
            yield Finding("data.tokenizer", f"{own}{problem}", "no-file")
            return
    if folder is None or name == "bpe":
        return
    yield from _outside(config, size)
    if name != folder and not config.data.foreign_tokenizer:
        yield from _foreign(name, content, folder)


def built_findings(config: RunConfig) -> Iterator[Finding]:
    """Yield a finding if the data are token files that were built with another tokenizer than the model's."""
    folder, sources = config.model.pretrained, config.data.sources
    if folder is None or config.data.foreign_tokenizer or len(sources) != 1:
        return
    built = Path(sources[0]) / "tokenizer" / NAME
    if not (Path(sources[0]) / "build.json").is_file() or not built.is_file():
        return
    try:
        own, other = read_tokenizer_file(tokenizer_file(folder)), read_tokenizer_file(built)
    except DataError:
        return  # reported for data.tokenizer
    if _named(own) != _named(other) and not _equal(folder, str(built.parent)):
        message = (
            f"{sources[0]!r} was built with another tokenizer than that of {_KEY}; build the text again with "
            f"data.tokenizer {folder!r}, or set data.foreign_tokenizer: true to train the model for other ids"
        )
        yield Finding("data.sources", message, "tokenizer")


def _unfit(settings: dict[str, Any], weights: dict[str, Weight], folder: Path) -> Iterator[Finding]:
    found = list(islice(mismatches(settings, weights), 1000))
    if found:
        more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
        message = f"{folder}: {'; '.join(found[:_SHOWN])}{more}; give the config.json that belongs to these weights"
        yield Finding(_KEY, message, "pretrained")


def _too_long(config: RunConfig, settings: dict[str, Any], weights: dict[str, Weight]) -> Iterator[Finding]:
    """Check the row length and `model.max_positions` against the folder's positions."""
    reach, length = reach_of(settings, weights), config.data.sequence_length
    raised, rope = config.model.max_positions, config.model.rope
    ours = rope is not None or "rope_parameters" in config.model.extra
    if rope is not None and (reach.learned if reach else not rope_of(settings)):
        yield Finding("model.rope", "the folder's model has no rotary positions; remove the key", "rope")
    elif rope is not None:
        yield from of_the_model(config, settings)
    if reach is None:
        return
    if reach.learned:
        if raised is not None:
            message = f"got {raised}, but the folder's {reach.positions:,} positions are learned; remove the key"
            yield Finding("model.max_positions", message, "length")
        if length > reach.positions:
            message = f"got {length}, but the folder's {reach.positions:,} positions are learned; use at most as many"
            yield Finding("data.sequence_length", message, "length")
    elif raised is not None and raised < reach.positions:
        message = f"got {raised}, below the folder's {reach.positions}; remove the key, or raise it"
        yield Finding("model.max_positions", message, "length")
    elif raised is not None and raised > reach.positions and reach.scaling is not None and not ours:
        message = (
            f"got {raised}, but the folder's {reach.scaling} RoPE is scaled from its own {reach.positions}; give "
            "model.rope too, with original_max_position_embeddings"
        )
        yield Finding("model.max_positions", message, "length")
    elif raised is None and rope is None and length > reach.positions:
        message = (
            f"got {length}, above the {reach.positions:,} positions of {_KEY}; lower it, or extend them: set model.rope"
            f" (rope_type yarn, say), or model.max_positions to {length} to train further out with the same RoPE"
        )
        yield Finding("data.sequence_length", message, "length")


def _outside(config: RunConfig, size: int) -> Iterator[Finding]:
    """Report a tokenizer with more ids than the embedding has rows."""
    assert config.model.pretrained is not None
    try:
        rows = whole_number(text_settings(read_settings(config.model.pretrained)), "vocab_size")
    except ModelError:
        return  # reported for model.pretrained
    if rows is not None and size > rows:
        message = (
            f"{show(config.data.tokenizer)} has {size:,} ids, but the embedding of {_KEY} has {rows:,} rows; use the "
            "model's own tokenizer: remove the key"
        )
        yield Finding("data.tokenizer", message, "vocabulary")


def _foreign(name: str, content: dict[str, Any] | None, folder: str) -> Iterator[Finding]:
    """Report a tokenizer other than the folder's own, compared by what determines its ids."""
    try:
        own = read_tokenizer_file(tokenizer_file(folder))
    except DataError:
        if content is not None:
            return  # the folder has no tokenizer: assume that the given one is the model's
        same = False
    else:
        same = (_bytes() if content is None else _named(content)) == _named(own) or _equal(name, folder)
    if not same:
        message = (
            f"got {show(name)}, whose ids are not those that {_KEY} was trained with; remove the key to use the "
            "folder's own tokenizer, or set data.foreign_tokenizer: true to train its embedding for other ids"
        )
        yield Finding("data.tokenizer", message, "tokenizer")


def _named(content: dict[str, Any]) -> str:
    from longctx.data.tokenizers.tokenizer import tokenizer_hash  # imports numpy

    return tokenizer_hash(content, None)


def _equal(name: str, other: str) -> bool:
    """Whether two tokenizers with different files are equal once loaded: some transformers classes rewrite the file."""
    from longctx.data.tokenizers.tokenizer import load_tokenizer

    try:
        return load_tokenizer(name).hash == load_tokenizer(other).hash
    except LongctxError:
        return False


def _bytes() -> str:
    from longctx.data.tokenizers.tokenizer import ByteTokenizer

    return _named(ByteTokenizer().json)


FOLDER_RULES: tuple[Rule, ...] = (tokenizer_findings, pretrained_findings, built_findings, lora_modules, lora_package)
"""What `model.pretrained` and `data.tokenizer` ask of this machine's files"""
