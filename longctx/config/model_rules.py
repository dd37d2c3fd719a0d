"""Rules of the `model:` section: a source, consistent sizes, and further keywords."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from longctx.config import architecture
from longctx.config.fields import changed
from longctx.config.findings import Finding, Rule
from longctx.config.schema import RunConfig

_SIZES = ("hidden_size", "layers", "heads")
_BESIDE_A_FOLDER = frozenset({"pretrained", "dtype", "max_positions", "rope", "lora", "extra"})


def _source(config: RunConfig) -> Iterator[Finding]:
    model = config.model
    if model.pretrained is None and model.architecture is None:
        message = "give architecture and sizes (from scratch), or pretrained (a folder)"
        yield Finding("model", message, "model-source")
    elif model.pretrained is not None:
        for name in sorted(changed(model) - _BESIDE_A_FOLDER):
            message = "the pretrained folder decides this; remove the key, or remove model.pretrained"
            yield Finding(f"model.{name}", message, "model-source")


def _missing_size(name: str, config: RunConfig) -> Iterator[Finding]:
    model = config.model
    if model.pretrained is None and model.architecture is not None and getattr(model, name) is None:
        message = f"is missing; architecture {model.architecture} from scratch needs {', '.join(_SIZES)}"
        yield Finding(f"model.{name}", message, "missing")


def _head_size(config: RunConfig) -> Iterator[Finding]:
    model, name = config.model, config.model.architecture
    heads, hidden = model.heads, model.hidden_size
    if name is None or heads is None or hidden is None:
        return
    free = name in architecture.FREE_HEAD_DIM
    if hidden % heads and (model.head_dim is None or not free):
        hint = ", or set model.head_dim" if free else ""
        message = f"got {heads}, which does not divide hidden_size {hidden}; change one of them{hint}"
        yield Finding("model.heads", message, "heads")
    elif model.head_dim is not None and not free and model.head_dim * heads != hidden:
        message = f"got {model.head_dim}, but {name} has heads of hidden_size / heads = {hidden // heads}; remove the "
        yield Finding("model.head_dim", message + "key", "heads")


def _kv_heads(config: RunConfig) -> Iterator[Finding]:
    name, heads, own = config.model.architecture, config.model.heads, config.model.kv_heads
    if name is None or heads is None or own is None:
        return
    if name not in architecture.GROUPED and own != heads:
        yield Finding("model.kv_heads", f"got {own}, but {name} has no grouped heads; remove the key", "heads")
    elif heads % own:
        divisors = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        yield Finding("model.kv_heads", f"got {own}, which does not divide heads {heads}; use {divisors}", "heads")


def _even_heads(config: RunConfig) -> Iterator[Finding]:
    model = config.model
    if model.architecture not in architecture.ROTARY or model.heads is None or model.hidden_size is None:
        return
    size = architecture.head_dim(model)
    if size is not None and size % 2 and (model.head_dim or model.hidden_size % model.heads == 0):
        key = "model.head_dim" if model.head_dim else "model.heads"
        message = f"a head of {size} is odd, and rotary positions need an even size; use {size + 1}"
        yield Finding(key, message, "heads")


def _extra(config: RunConfig) -> Iterator[Finding]:
    for key in config.model.extra:
        if key in architecture.OWNED_KEYWORDS:
            owner = architecture.OWNED_KEYWORDS[key]
            yield Finding(f"model.extra.{key}", f"belongs to {owner}; remove it here and set {owner}", "conflict")
        elif key in architecture.REFUSED_KEYWORDS or key.startswith("_"):
            message = "is refused: it would run third-party code or replace attention"
            yield Finding(f"model.extra.{key}", message, "refused")
        elif key != "rope_parameters" and config.model.pretrained is not None:
            message = "the pretrained folder decides this; only rope_parameters can be given with model.pretrained"
            yield Finding(f"model.extra.{key}", message, "model-source")


RULES: tuple[Rule, ...] = (
    _source,
    *(partial(_missing_size, name) for name in _SIZES),
    _head_size,
    _kv_heads,
    _even_heads,
    _extra,
)
