"""`data:`: paths that are local, keys that the tokenizer reads, and lengths that fit."""

from __future__ import annotations

from typing import Any

import pytest
from config_samples import FROM_FOLDER, load_variant, refused_by

from longctx.config.data_rules import RULES

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("vocabulary below tokenizer", {"model__vocab_size": 1000}, "model.vocab_size"),
    (
        "bytes vocabulary",
        {"data__tokenizer": "bytes", "data__vocab_size": ..., "model__vocab_size": 256},
        "model.vocab_size",
    ),
    ("positions below length", {"model__max_positions": 1024}, "model.max_positions"),
    ("evaluation of nothing", {"data__held_out": 0}, "train.eval_every"),
    ("vocabulary of bytes", {"data__tokenizer": "bytes"}, "data.vocab_size"),
    ("url", {"data__sources": ["https://user:hunter2@example.com/x"]}, "data.sources"),
    ("url of a folder", {"output__folder": "s3://bucket/run"}, "output.folder"),
    ("empty name", {"data__sources": [" "]}, "data.sources"),
    ("weights of other sources", {"data__sources": ["a", "b"], "data__weights": [1, 2, 3]}, "data.weights"),
    ("long documents in concat", {"data__long_documents": "drop"}, "data.long_documents"),
    ("streaming of files", {"data__streaming": True}, "data.streaming"),
    ("foreign tokenizer of no folder", {"data__foreign_tokenizer": True}, "data.foreign_tokenizer"),
    (
        "trained tokenizer of a folder",
        {**FROM_FOLDER, "model__pretrained": "m", "data__tokenizer": "bpe"},
        "data.tokenizer",
    ),
]


@pytest.mark.parametrize(("changes", "key"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_broken_rules_are_refused_by_key(changes: dict[str, Any], key: str) -> None:
    assert key in refused_by(RULES, changes)


def test_legal_ones_pass() -> None:
    load_variant(model__vocab_size=1024, model__max_positions=4096)
    load_variant(data__tokenizer="bytes", data__vocab_size=..., model__vocab_size=257)
