"""Rules of the `data:` section: local paths, the tokenizer's keys, vocabulary size and row length."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from longctx.config import architecture
from longctx.config.fields import changed, environment_ok
from longctx.config.findings import Finding, Rule
from longctx.config.keys import Leaf, leaves
from longctx.config.problems import redact, show
from longctx.config.schema import RunConfig


def _local_path(leaf: Leaf, config: RunConfig) -> Iterator[Finding]:
    """Reject URLs: nothing is downloaded, and a URL may contain credentials."""
    value = leaf.value_in(config)
    if isinstance(value, str) and "://" in value:
        message = f"got {redact(value)!r}; nothing is downloaded: give a path of this machine"
        yield Finding(leaf.key, message, "url")


def _sources(config: RunConfig) -> Iterator[Finding]:
    for source in config.data.sources:
        if "://" in source:
            message = f"got {redact(source)!r}; nothing is downloaded: give a file, a folder or python-stdlib"
            yield Finding("data.sources", message, "url")
        elif not source.strip():
            yield Finding("data.sources", "got an empty name; give a file, a folder or python-stdlib", "empty-name")


def _weights(config: RunConfig) -> Iterator[Finding]:
    weights, sources = config.data.weights, config.data.sources
    if weights and len(sources) > 1 and len(weights) != len(sources):  # one source may be a folder of several
        message = f"got {len(weights)} weights for {len(sources)} sources; give one for each, or remove the key"
        yield Finding("data.weights", message, "count")


def _long_documents(config: RunConfig) -> Iterator[Finding]:
    data = config.data
    if data.long_documents != "split" and data.packing == "concat":
        message = f"got {data.long_documents!r}, but packing: concat splits documents at any row end; use best_fit"
        yield Finding("data.long_documents", message, "idle-key")


def _streaming(config: RunConfig) -> Iterator[Finding]:
    if config.data.streaming and not any(source.startswith("hf:") for source in config.data.sources):
        message = "is only for hf: sources (files are never copied); remove the key"
        yield Finding("data.streaming", message, "idle-key")


def _foreign_tokenizer(config: RunConfig) -> Iterator[Finding]:
    if config.data.foreign_tokenizer and config.model.pretrained is None:
        yield Finding("data.foreign_tokenizer", "has no effect without model.pretrained; remove the key", "idle-key")


def _trained_tokenizer(config: RunConfig) -> Iterator[Finding]:
    if config.data.tokenizer == "bpe" and config.model.pretrained is not None and not config.data.foreign_tokenizer:
        message = (
            "got 'bpe', which assigns new ids, but model.pretrained was trained with its own tokenizer's; remove the "
            "key to use that one, or set data.foreign_tokenizer: true to train its embedding for other ids"
        )
        yield Finding("data.tokenizer", message, "tokenizer")


def _keys_of_bpe(config: RunConfig) -> Iterator[Finding]:
    data = config.data
    if data.tokenizer == "bpe":
        return
    for name in sorted({"vocab_size", "sample_bytes"} & changed(data)):
        message = f"is only for tokenizer: bpe, but tokenizer is {show(data.tokenizer)}; remove one of them"
        yield Finding(f"data.{name}", message, "idle-key")


def _vocabulary(config: RunConfig) -> Iterator[Finding]:
    rows, size = config.model.vocab_size, architecture.vocabulary_size(config)
    if size and rows is not None and rows < size:
        message = f"got {rows}, below the tokenizer's {size} tokens; use at least {size}, or remove the key"
        yield Finding("model.vocab_size", message, "vocabulary")


def _positions(config: RunConfig) -> Iterator[Finding]:
    positions, rope = config.model.max_positions, config.model.rope
    dynamic = rope is not None and rope.rope_type == "dynamic"  # extends rows beyond max_positions as they come
    if positions is not None and not dynamic and positions < config.data.sequence_length:
        message = f"got {positions}, below data.sequence_length {config.data.sequence_length}; raise it or remove the "
        yield Finding("model.max_positions", message + "key", "length")


def _evaluation(config: RunConfig) -> Iterator[Finding]:
    every = config.train.eval_every
    if every > 0 and config.data.held_out == 0:
        message = f"got {every}, but data.held_out is 0, so there is nothing to evaluate on; change one"
        yield Finding("train.eval_every", message, "idle-key")


RULES: tuple[Rule, ...] = (
    *(partial(_local_path, leaf) for leaf in leaves().values() if environment_ok(leaf.field)),
    _sources,
    _weights,
    _long_documents,
    _streaming,
    _foreign_tokenizer,
    _trained_tokenizer,
    _keys_of_bpe,
    _vocabulary,
    _positions,
    _evaluation,
)
