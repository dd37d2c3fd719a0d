"""The model as far as memory and time depend on it: widths and counts, from a YAML or from a folder's config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longctx.config.architecture import UNGATED, intermediate_size, vocabulary_size
from longctx.config.architecture import head_dim as head_dim_of
from longctx.config.schema import RunConfig
from longctx.errors import ConfigError
from longctx.nn.kinds import ABC, Ring, Window, read_layers


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes. `full_layers` attend to everything, `window_layers` to `window` keys, the rest keep a memory
    of `slots` slots a key head."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    tied: bool = False
    gated: bool = True
    itemsize: int = 2
    window: int | None = None
    window_layers: int = 0
    memory_layers: int = 0
    slots: int = 0

    @property
    def full_layers(self) -> int:
        return self.layers - self.window_layers - self.memory_layers

    @property
    def q_width(self) -> int:
        """Numbers of a token's queries."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Numbers of a token's keys, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def attention_weights(self) -> int:
        """Of one layer."""
        return 2 * self.hidden * (self.q_width + self.kv_width)

    @property
    def mlp_weights(self) -> int:
        """Of one layer."""
        return (3 if self.gated else 2) * self.hidden * self.inner

    @property
    def layer_weights(self) -> int:
        """Of one layer, norms included."""
        return self.attention_weights + self.mlp_weights + 2 * self.hidden

    @property
    def embedding(self) -> int:
        """Numbers of the embedding, and of the head."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_weights + self.embedding * (1 if self.tied else 2) + self.hidden

    @property
    def matrix_weights(self) -> int:
        """Weights that take part in products for every token: all but the embedding's table and the norms."""
        return self.layers * (self.attention_weights + self.mlp_weights) + self.embedding


def shape_of(config: RunConfig) -> ModelShape:
    """Return the shape of a run's model, from its `model:` section or its pretrained folder.

    Raises:
        ConfigError: a size is not known before the tokenizer is made, or the folder's config.json lacks one.
    """
    model, itemsize = config.model, 4 if config.model.dtype == "fp32" else 2
    if model.pretrained is not None:
        settings = _read(Path(model.pretrained) / "config.json")
        return _mixed(shape_of_settings(settings, itemsize), config)
    vocab = model.vocab_size or vocabulary_size(config)
    inner, size = intermediate_size(model), head_dim_of(model)
    if vocab is None:
        raise ConfigError(
            f"plan: the vocabulary of tokenizer {config.data.tokenizer!r} is not known here; set model.vocab_size"
        )
    assert model.hidden_size and model.layers and model.heads and inner and size  # rules require them
    shape = ModelShape(
        hidden=model.hidden_size,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.kv_heads or model.heads,
        head_dim=size,
        inner=inner,
        vocab=vocab,
        tied=model.tie_embeddings,
        gated=model.architecture not in UNGATED,
        itemsize=itemsize,
        window=config.attention.window,
        window_layers=model.layers if config.attention.window else 0,
    )
    return _mixed(shape, config)


def shape_of_settings(settings: dict[str, Any], itemsize: int = 2) -> ModelShape:
    """Return the shape that a transformers config.json describes.

    Raises:
        ConfigError: it lacks a size.
    """

    def size(*names: str, default: int | None = None) -> int:
        found = next((settings[name] for name in names if settings.get(name) is not None), default)
        if not isinstance(found, int) or found < 1:
            raise ConfigError(f"plan: config.json has no {names[0]} that is a positive whole number, but {found!r}")
        return found

    kind = settings.get("model_type")
    hidden, heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head")
    layers, window = size("num_hidden_layers", "n_layer"), settings.get("sliding_window")
    if settings.get("use_sliding_window") is False or not isinstance(window, int):
        window = None
    kinds = settings.get("layer_types") or ["sliding_attention"] * layers
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=size("num_key_value_heads", default=heads),
        head_dim=size("head_dim", default=hidden // heads),
        inner=size("intermediate_size", "n_inner", default=4 * hidden),
        vocab=size("vocab_size"),
        tied=bool(settings.get("tie_word_embeddings", kind in ("gpt2", "gemma", "gemma2", "gemma3_text"))),
        gated=kind not in UNGATED,
        itemsize=itemsize,
        window=window,
        window_layers=kinds.count("sliding_attention") if window else 0,
    )


def _mixed(shape: ModelShape, config: RunConfig) -> ModelShape:
    """Count the layers that `attention.layers` gives a window or a memory of their own."""
    if not config.attention.layers:
        return shape
    kinds = read_layers(config.attention.layers, shape.layers)
    windows = [kind.size for kind in kinds if isinstance(kind, Window)]
    memories = [kind for kind in kinds if not isinstance(kind, Ring | Window)]
    return replace(
        shape,
        window=max(windows, default=shape.window),
        window_layers=len(windows) or min(shape.window_layers, shape.layers - len(memories)),
        memory_layers=len(memories),
        slots=max((kind.slots if isinstance(kind, ABC) else shape.head_dim for kind in memories), default=0),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"plan: {path} is missing or not JSON; give model.pretrained a transformers folder")
    return settings
