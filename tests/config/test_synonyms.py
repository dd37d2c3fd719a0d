"""Other tools' names for our keys: each leads to one key that exists."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from config_samples import BASE, problems_of, text_of

from longctx.config import synonyms
from longctx.config.keys import leaves


@pytest.mark.parametrize(
    ("section", "name", "meant"),
    [
        ("train", "learning_rate", "train.lr"),
        ("train", "batch_size", "train.micro_batch"),
        ("train", "gradient_clipping", "train.clip"),
        ("", "seq_len", "data.sequence_length"),
        ("model", "num_hidden_layers", "model.layers"),
        ("model", "num_key_value_heads", "model.kv_heads"),
        ("model", "gradient_checkpointing", "memory.recompute"),
        ("mesh", "context_parallel_size", "mesh.ring"),
        ("", "output_dir", "output.folder"),
        ("", "zero_stage", "zero.stage"),
        ("checkpoint", "save_steps", "checkpoint.every"),
        ("train", "stage", "zero.stage"),
    ],
)
def test_names_from_other_tools_are_understood(section: str, name: str, meant: str) -> None:
    tree: dict[str, Any] = copy.deepcopy(BASE)
    (tree[section] if section else tree)[name] = 1
    assert f"{meant!r}" in str(problems_of(text_of(tree)))


def test_every_synonym_leads_to_one_key_that_exists() -> None:
    assert set(synonyms._NAMES) <= set(leaves())
    names = [name for line in synonyms._NAMES.values() for name in line.split()]
    assert len(names) == len(set(names)) == len(synonyms.SYNONYMS)
    assert all(synonyms.SYNONYMS[name] != name and name == name.lower() for name in names)
