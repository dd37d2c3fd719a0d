"""Rules for `attention.layers`: kinds and options, and what they ask of model, length and layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from longctx.config.architecture import CONVERTIBLE
from longctx.config.schema import RunConfig
from longctx.errors import ModelError
from longctx.nn.kinds import ABC, Cosine, Kind, read_layers

_ANY = 10**6  # layers of a model whose number is not known before it is loaded


def broken_layers(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for everything wrong with the kinds of the layers."""
    if not config.attention.layers:
        return
    name, layers = _model(config)
    if name is not None and name.removeprefix("longctx_") not in CONVERTIBLE:
        able = ", ".join(sorted(CONVERTIBLE))
        yield "attention.layers", f"{name} keeps its layers; architectures whose layers can be chosen: {able}"
        return
    try:
        kinds = set(read_layers(config.attention.layers, layers or _ANY))
    except ModelError as problem:
        yield "attention.layers", str(problem).removeprefix("layers: ")
        return
    if config.attention.layout == "striped" and any(isinstance(kind, ABC | Cosine) for kind in kinds):
        message = "got 'striped', which deals neighbours to different ranks: a memory cannot be handed on; use zigzag"
        yield "attention.layout", message
    for kind in sorted(kinds, key=repr):
        yield from (("attention.layers", message) for message in _unfit(kind, config))


def _unfit(kind: Kind, config: RunConfig) -> Iterator[str]:
    """Yield what this kind cannot do in a causal model on rows of this length."""
    length = config.data.sequence_length
    if not isinstance(kind, ABC):
        return
    if kind.normalizer == "global":
        yield "abc: normalizer 'global' sees the future, and this model is causal; use prefix or running"
    reach = kind.max_length or config.model.max_positions or length
    if kind.control == "linformer" and config.model.pretrained is None and reach < length:
        yield f"abc: linformer has weights for {reach} positions, below data.sequence_length {length}; raise max_length"


def _model(config: RunConfig) -> tuple[str | None, int | None]:
    """Return the architecture and its number of layers, as far as they are known before the model is loaded."""
    if config.model.pretrained is None:
        return config.model.architecture, config.model.layers
    try:
        raw = json.loads((Path(config.model.pretrained) / "config.json").read_text(encoding="utf-8"))
        return str(raw["model_type"]), int(raw.get("num_hidden_layers", raw.get("n_layer")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, None  # whoever looks at the machine says what is wrong with the folder
