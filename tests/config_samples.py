"""A small valid configuration for the tests of config/ and cli, and ways to write and load variants of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from longctx.config.findings import Rule, judge
from longctx.config.load import Loaded, loads
from longctx.config.problems import InvalidConfig
from longctx.config.schema import RunConfig
from longctx.config.strict_yaml import parse
from longctx.config.write import scalar

BASE: dict[str, dict[str, Any]] = {
    "model": {"architecture": "llama", "hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "dtype": "fp32"},
    "mesh": {"ring": 2, "data": 2, "world": 4},
    "attention": {"layout": "zigzag", "backend": "aten"},
    "data": {
        "sources": ["python-stdlib"],
        "tokenizer": "bpe",
        "vocab_size": 1024,
        "sequence_length": 4096,
        "packing": "concat",
        "held_out": 0.05,
    },
    "train": {
        "steps": 100,
        "global_batch": 4,
        "micro_batch": 1,
        "optimizer": "adamw",
        "lr": 0.001,
        "schedule": "cosine",
        "warmup_steps": 10,
        "clip": 1.0,
        "eval_every": 20,
    },
    "zero": {"stage": 2, "offload_optimizer": "none", "overlap_comm": False},
    "checkpoint": {"every": 50, "keep": 2, "resume": "auto"},
    "output": {"folder": "runs/test", "tensorboard": False, "sample_tokens": 8},
}


FROM_FOLDER: dict[str, Any] = {f"model__{key}": ... for key in BASE["model"] if key != "dtype"}
FROM_FOLDER |= {"data__tokenizer": ..., "data__vocab_size": ...}
"""changes after which `model.pretrained` decides the model and its tokenizer"""


def variant(**changes: Any) -> dict[str, Any]:
    """Return BASE with ``section__key=value`` changes; a value of ``...`` removes the key."""
    tree: dict[str, Any] = copy.deepcopy(BASE)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if value is ...:
            del tree[section][key]
        else:
            tree.setdefault(section, {})[key] = value
    return tree


def text_of(tree: dict[str, Any]) -> str:
    """Write a tree as block YAML, one key per line."""
    lines = []
    for section, block in tree.items():
        if isinstance(block, dict):
            lines += [f"{section}:"] + [f"  {key}: {scalar(value)}" for key, value in block.items()]
        else:
            lines.append(f"{section}: {scalar(block)}")
    return "\n".join(lines) + "\n"


def load_variant(**changes: Any) -> Loaded:
    """Load a variant of BASE."""
    return loads(text_of(variant(**changes)), name="run.yaml")


def problems_of(text: str | bytes, *overrides: str) -> InvalidConfig:
    """Return the error that loading ``text`` gives; anything but an InvalidConfig fails the test."""
    try:
        loaded = loads(text, overrides, name="run.yaml")
    except InvalidConfig as error:
        return error
    raise AssertionError(f"accepted: {loaded.config}")


def refused_by(rules: Iterable[Rule], changes: dict[str, Any]) -> set[str]:
    """Return the keys that ``rules`` find wrong in a variant of BASE; loading it names each of them, briefly."""
    text = text_of(variant(**changes))
    values = {section: block or {} for section, block in parse(text, "").value.items()}
    keys = {finding.key for finding in judge(rules, RunConfig.model_validate(values))}
    if keys:
        error = problems_of(text)
        assert keys <= {problem.key for problem in error.problems}, str(error)
        assert all(len(str(problem)) < 400 for problem in error.problems)
    return keys
