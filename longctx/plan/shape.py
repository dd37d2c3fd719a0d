"""The model's sizes on which memory and time depend, from a YAML file or from a folder's config.json."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from longctx.config.architecture import UNGATED, intermediate_size, parameter_count, vocabulary_size
from longctx.config.architecture import head_dim as head_dim_of
from longctx.config.lora import trained_parameters
from longctx.config.schema import RunConfig
from longctx.errors import ConfigError, ModelError
from longctx.models.load.expected import tied
from longctx.models.load.experts import Experts, experts_of
from longctx.models.load.settings import read_settings, text_settings
from longctx.nn.kinds import ABC, Ring, Window, read_layers


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes. `full_layers` attend to all keys, `window_layers` to `window` keys; `bounded_layers` have a
    state of `slots` slots per key head."""

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
    bounded_layers: int = 0
    slots: int = 0
    experts: Experts | None = None
    """the sparse MLPs; `inner` is then the width that one token uses, and `dense_inner` the width of a dense layer"""
    dense_inner: int = 0
    projections: int | None = None
    """weights per layer of latent attention's projections; None: q, k, v and o"""
    small: int = 0
    """weights per layer besides matrices and the two norms: biases, norms of q and k"""
    counted: int | None = None
    """parameters counted from the weight files; None: from the formulas"""
    trained: int | None = None
    """parameters that are trained; None: all (with `model.lora`: those of the adapters)"""

    @property
    def full_layers(self) -> int:
        return self.layers - self.window_layers - self.bounded_layers

    @property
    def q_width(self) -> int:
        """Elements of the queries per token."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of the keys, and of the values, per token."""
        return self.kv_heads * self.head_dim

    @property
    def attention_weights(self) -> int:
        """Weights of attention's projections per layer."""
        return 2 * self.hidden * (self.q_width + self.kv_width) if self.projections is None else self.projections

    @property
    def mlp_weights(self) -> int:
        """Weights of one MLP, a sparse one in a mixture of experts."""
        return self._dense_mlp(self.inner) if self.experts is None else self.experts.weights(self.hidden)

    @property
    def largest_mlp_weight(self) -> int:
        """Elements of an MLP's largest weight; the gate and up projections of all experts are one weight."""
        if self.experts is None:
            return self.hidden * self.inner
        return 2 * self.experts.count * self.hidden * self.experts.inner

    @property
    def all_mlp_weights(self) -> int:
        """Weights of the MLPs of all layers."""
        return self._over_layers(self.mlp_weights)

    @property
    def mlp_products(self) -> int:
        """MLP weights of all layers that one token is multiplied with."""
        return self._over_layers(self.mlp_weights if self.experts is None else self.experts.used(self.hidden))

    @property
    def layer_weights(self) -> int:
        """Weights of one layer, with its norms."""
        return self.attention_weights + self.mlp_weights + 2 * self.hidden + self.small

    @property
    def embedding(self) -> int:
        """Weights of the embedding, and of the head."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        if self.counted is not None:
            return self.counted
        each = self.attention_weights + 2 * self.hidden + self.small
        return self.layers * each + self.all_mlp_weights + self.embedding * (1 if self.tied else 2) + self.hidden

    @property
    def trainable(self) -> int:
        """Parameters with gradients and optimizer states."""
        return self.parameters if self.trained is None else self.trained

    @property
    def matrix_weights(self) -> int:
        """Weights that every token is multiplied with: all but the embedding and the norms."""
        return self.layers * self.attention_weights + self.mlp_products + self.embedding

    def _dense_mlp(self, inner: int) -> int:
        return (3 if self.gated else 2) * self.hidden * inner

    def _over_layers(self, sparse: int) -> int:
        """Sum over layers: ``sparse`` for a layer with experts (in a dense model, for any layer), else a dense MLP."""
        if self.experts is None:
            return self.layers * sparse
        dense = self.layers - self.experts.layers
        return self.experts.layers * sparse + dense * self._dense_mlp(self.dense_inner)


def shape_of(config: RunConfig) -> ModelShape:
    """Return the shape of a run's model, from its `model:` section or its pretrained folder.

    Raises:
        ConfigError: the vocabulary is unknown until the tokenizer is loaded, or the folder's config.json lacks a size.
    """
    model, itemsize = config.model, 4 if config.model.dtype == "fp32" else 2
    if model.pretrained is not None:
        try:
            shape = shape_of_settings(read_settings(model.pretrained), itemsize)
        except ModelError as problem:
            raise ConfigError(f"plan: {problem}") from None
        counted = _counted(shape, parameter_count(config), model.pretrained)
        return _mixed(replace(counted, trained=trained_parameters(config)), config)
    vocab = model.vocab_size or vocabulary_size(config)
    inner, size = intermediate_size(model), head_dim_of(model)
    if vocab is None:
        raise ConfigError(
            f"plan: the vocabulary of tokenizer {config.data.tokenizer!r} is unknown before it is loaded; set "
            "model.vocab_size"
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
        ConfigError: a size is missing.
    """

    def size(*names: str, default: int | None = None) -> int:
        found = next((settings[name] for name in names if settings.get(name) is not None), default)
        if not isinstance(found, int) or found < 1:
            raise ConfigError(f"plan: config.json has no {names[0]} that is a positive whole number, but {found!r}")
        return found

    settings = text_settings(settings)
    kind = str(settings.get("model_type"))
    hidden, heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head")
    layers, window = size("num_hidden_layers", "n_layer"), settings.get("sliding_window")
    if settings.get("use_sliding_window") is False or not isinstance(window, int):
        window = None
    kinds = settings.get("layer_types") or ["sliding_attention"] * layers
    experts, inner = experts_of(settings), size("intermediate_size", "n_inner", default=4 * hidden)
    head, projections = _latent(settings, hidden, heads) or (size("head_dim", default=hidden // heads), None)
    groups = heads if projections else size("num_key_value_heads", default=heads)
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=groups,
        head_dim=head,
        inner=inner if experts is None else experts.width,
        vocab=size("vocab_size"),
        tied=tied(settings),
        gated=kind not in UNGATED,
        itemsize=itemsize,
        window=window,
        window_layers=kinds.count("sliding_attention") if window else 0,
        experts=experts,
        dense_inner=inner,
        projections=projections,
        small=_small(settings, kind, heads, groups, head, experts),
    )


def _counted(shape: ModelShape, parameters: int | None, folder: str) -> ModelShape:
    """Take the parameters from the weight files; raise ConfigError if the formulas differ by more than 10 %."""
    if parameters is not None and abs(shape.parameters - parameters) > 0.1 * parameters:
        raise ConfigError(
            f"plan: the weights of {folder} have {parameters:,} elements, but the planner's formulas give "
            f"{shape.parameters:,}: it does not know this kind of model; measure it with `longctx rehearse`"
        )
    return replace(shape, counted=parameters)


def _latent(settings: dict[str, Any], hidden: int, heads: int) -> tuple[int, int] | None:
    """Return (size of a query head, weights of a layer's projections) of latent attention, or None without it."""
    rank, rotary = settings.get("kv_lora_rank"), settings.get("qk_rope_head_dim")
    plain, value = settings.get("qk_nope_head_dim"), settings.get("v_head_dim")
    if not (isinstance(rank, int) and isinstance(rotary, int) and isinstance(plain, int) and isinstance(value, int)):
        return None
    size, query = plain + rotary, settings.get("q_lora_rank")
    queries = hidden * heads * size if not isinstance(query, int) else query * (hidden + 1 + heads * size)
    keys = hidden * (rank + rotary) + rank + rank * heads * (plain + value)  # with the norm of the latent vector
    return size, queries + keys + heads * value * hidden


def _small(settings: dict[str, Any], kind: str, heads: int, groups: int, size: int, experts: Experts | None) -> int:
    """Count a layer's biases and norms of q and k, by kind of model."""
    found = 0
    if kind in ("qwen3", "qwen3_moe"):
        found += 2 * size
    elif kind in ("olmoe", "olmo2"):
        found += (heads + groups) * size
    if kind in ("qwen2", "qwen2_moe"):
        found += (heads + 2 * groups) * size
    if kind in ("deepseek_v3", "glm4_moe") and experts is not None and settings.get("kv_lora_rank") is None:
        found += experts.count
    return found


def _mixed(shape: ModelShape, config: RunConfig) -> ModelShape:
    """Count the layers to which `attention.layers` gives a window or a bounded state."""
    if not config.attention.layers:
        return shape
    kinds = read_layers(config.attention.layers, shape.layers)
    windows = [kind.size for kind in kinds if isinstance(kind, Window)]
    bounded = [kind for kind in kinds if not isinstance(kind, Ring | Window)]
    return replace(
        shape,
        window=max(windows, default=shape.window),
        window_layers=len(windows) or min(shape.window_layers, shape.layers - len(bounded)),
        bounded_layers=len(bounded),
        slots=max((kind.slots if isinstance(kind, ABC) else shape.head_dim for kind in bounded), default=0),
    )
