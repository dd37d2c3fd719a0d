"""Rules of the `model:` section: a source, sizes that fit together, and keywords that are left to the user."""

from __future__ import annotations

from collections.abc import Iterator

from longctx.config import architecture
from longctx.config.fields import changed
from longctx.config.sections.model import ModelSection

Broken = tuple[str, str, str]  # key, message, code


def broken_model(model: ModelSection) -> Iterator[Broken]:
    """Yield every rule that the section breaks."""
    yield from _model_source(model)
    yield from _heads(model)
    yield from _extra(model)


def _model_source(model: ModelSection) -> Iterator[Broken]:
    sizes = ("hidden_size", "layers", "heads")
    if model.pretrained is None and model.architecture is None:
        yield ("model", "give architecture and sizes (from scratch), or pretrained (a folder)", "model-source")
    elif model.pretrained is not None:
        own = {"pretrained", "dtype", "max_positions", "extra"}
        for name in changed(model):
            if name not in own:
                message = "the pretrained folder decides this; remove the key, or remove model.pretrained"
                yield (f"model.{name}", message, "model-source")
    else:
        for name in sizes:
            if getattr(model, name) is None:
                message = f"is missing; architecture {model.architecture} from scratch needs {', '.join(sizes)}"
                yield (f"model.{name}", message, "missing")


def _heads(model: ModelSection) -> Iterator[Broken]:
    name, heads, hidden = model.architecture, model.heads, model.hidden_size
    if name is None or heads is None or hidden is None:
        return
    even = hidden % heads == 0
    if not even and (model.head_dim is None or name not in architecture.FREE_HEAD_DIM):
        hint = "" if name not in architecture.FREE_HEAD_DIM else ", or set model.head_dim"
        message = f"got {heads}, which does not divide hidden_size {hidden}; change one of them{hint}"
        yield ("model.heads", message, "heads")
    elif model.head_dim is not None and name not in architecture.FREE_HEAD_DIM and model.head_dim * heads != hidden:
        message = (
            f"got {model.head_dim}, but {name} has heads of hidden_size / heads = {hidden // heads}; remove the key"
        )
        yield ("model.head_dim", message, "heads")
    if model.kv_heads is not None and name not in architecture.GROUPED and model.kv_heads != heads:
        yield ("model.kv_heads", f"got {model.kv_heads}, but {name} has no grouped heads; remove the key", "heads")
    elif model.kv_heads is not None and heads % model.kv_heads:
        divisors = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        yield ("model.kv_heads", f"got {model.kv_heads}, which does not divide heads {heads}; use {divisors}", "heads")
    size = architecture.head_dim(model)
    if name in architecture.ROTARY and size is not None and size % 2 and (even or model.head_dim):
        key = "model.head_dim" if model.head_dim else "model.heads"
        yield (key, f"a head of {size} is odd, and rotary positions need an even size; use {size + 1}", "heads")


def _extra(model: ModelSection) -> Iterator[Broken]:
    for key in model.extra:
        if model.pretrained is not None and key != "rope_parameters":
            message = "the pretrained folder decides this; only rope_parameters can be given with model.pretrained"
            yield (f"model.extra.{key}", message, "model-source")
        elif key in architecture.OWNED_KEYWORDS:
            owner = architecture.OWNED_KEYWORDS[key]
            yield (f"model.extra.{key}", f"belongs to {owner}; remove it here and set {owner}", "conflict")
        elif key in architecture.REFUSED_KEYWORDS or key.startswith("_"):
            yield (f"model.extra.{key}", "is refused: it would run foreign code or replace attention", "refused")
