"""Rules of `attention.layers`: kinds and options, and what they require of model, length and layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longctx.config.architecture import CONVERTIBLE
from longctx.config.findings import Finding, Rule
from longctx.config.schema import RunConfig
from longctx.errors import ModelError
from longctx.nn.kinds import ABC, Cosine, Kind, read_indices, read_kind, read_layers

_KEY = "attention.layers"
_ANY = 10**6  # stands for a number of layers that is unknown before the model is loaded


def _entries(config: RunConfig) -> Iterator[Finding]:
    """Check each entry by itself: valid layer indices, and a known kind with valid options."""
    for layers, kind in config.attention.layers.items():
        for problem in (_problem_of_layers(layers, _ANY), _problem_of_kind(kind, layers)):
            if problem is not None:
                yield Finding(_KEY, problem, "layers")


def _within_the_model(config: RunConfig) -> Iterator[Finding]:
    """Report valid indices of layers that the model does not have."""
    layers = config.attention.layers
    if not layers:
        return
    count = _model(config)[1] or _ANY
    for key in layers:
        if _problem_of_layers(key, _ANY) is None:
            problem = _problem_of_layers(key, count)
            if problem is not None:
                yield Finding(_KEY, problem, "layers")


def _convertible(config: RunConfig) -> Iterator[Finding]:
    if not config.attention.layers:
        return
    name, _ = _model(config)
    if name is not None and name.removeprefix("longctx_") not in CONVERTIBLE:
        able = ", ".join(sorted(CONVERTIBLE))
        message = f"layers of {name} cannot be replaced; architectures whose layers can: {able}"
        yield Finding(_KEY, message, "layers")


def _striped(config: RunConfig) -> Iterator[Finding]:
    if any(isinstance(kind, ABC | Cosine) for kind in _kinds(config)) and config.attention.layout == "striped":
        message = (
            "got 'striped', which shards neighbouring tokens over different ranks, so that a bounded layer cannot pass "
            "its state from rank to rank; use zigzag"
        )
        yield Finding("attention.layout", message, "layers")


def _causal(config: RunConfig) -> Iterator[Finding]:
    for kind in _kinds(config):
        if isinstance(kind, ABC) and kind.normalizer == "global":
            message = "abc: normalizer 'global' sees the future, and this model is causal; use prefix or running"
            yield Finding(_KEY, message, "layers")


def _linformer(config: RunConfig) -> Iterator[Finding]:
    for kind in _kinds(config):
        if isinstance(kind, ABC) and kind.control == "linformer" and config.model.pretrained is None:
            length = config.data.sequence_length
            reach = kind.max_length or config.model.max_positions or length
            if reach < length:
                message = f"abc: linformer has weights for {reach} positions, below data.sequence_length {length}; "
                yield Finding(_KEY, message + "raise max_length", "layers")


def _kinds(config: RunConfig) -> list[Kind]:
    """Return the distinct kinds of the layers; invalid entries are skipped."""
    layers = config.attention.layers
    if not layers:
        return []
    count = _model(config)[1] or _ANY
    readable = {
        key: kind
        for key, kind in layers.items()
        if _problem_of_layers(key, count) is None and _problem_of_kind(kind, key) is None
    }
    return sorted(set(read_layers(readable, count)), key=repr) if readable else []


def _problem_of_kind(value: Any, layers: str) -> str | None:
    try:
        read_kind(value, f"layers {layers!r}")
    except ModelError as problem:
        return str(problem).removeprefix("layers: ")
    return None


def _problem_of_layers(key: str, count: int) -> str | None:
    try:
        read_indices(key, count)
    except ModelError as problem:
        return str(problem).removeprefix("layers: ")
    return None


def _model(config: RunConfig) -> tuple[str | None, int | None]:
    """Return the architecture and its number of layers, each None if unknown before the model is loaded."""
    folder = config.model.pretrained
    if folder is None:
        return config.model.architecture, config.model.layers
    try:
        raw = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return str(raw["model_type"]), int(raw.get("num_hidden_layers", raw.get("n_layer")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, None  # `machine.inspect` reports what is wrong with the folder


RULES: tuple[Rule, ...] = (_entries, _within_the_model, _convertible, _striped, _causal, _linformer)
