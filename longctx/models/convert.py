"""longctx.convert: change the kind of attention of chosen layers of a transformers model, keeping its weights."""

from __future__ import annotations

import copy
import difflib
from typing import Any

from longctx.errors import ModelError
from longctx.models.hook.families import FAMILIES, MixedLayers, attach_bounded_layers, family_of, mixed_classes
from longctx.models.names import NAME
from longctx.models.register import register
from longctx.nn.kinds import read_layers, write_layers


def convert(model: Any, layers: dict[Any, Any]) -> Any:
    """Change how chosen layers of ``model`` attend, in place, and return it; for a config, return a converted copy.

        longctx.convert(model, {"0-5": "ring", "6-11": {"abc": {"slots": 64}}, "3": "cosine", "4": {"window": 1024}})

    Kinds are ``ring`` (exact softmax, unchanged), ``window``, ``abc`` and ``cosine``; docs/bounded_models.md lists
    their options. Projections, norms and rotary positions of every layer keep their parameter names; ABC's control and
    Cottention's exponents are new, drawn from torch's generator. Converting again changes only the given layers. The
    model gets its family's ``Longctx…`` class: ``save_pretrained`` writes a folder that the Auto classes load once
    ``longctx.register()`` has been called.

    Args:
        model: a causal language model of Llama, Mistral, Qwen 2 or 3 or GPT-2, or a BERT with its masked-LM head, not
            partitioned by ZeRO-3; or the config of one.
        layers: which layers (``"3"``, ``"0-5"``, ``"1, 4-6"``, ``"*"``), and what they become; later entries win.

    Raises:
        ModelError: an unknown family, layer, kind or option; a model that is partitioned.
    """
    register()
    config = getattr(model, "config", model)
    family = _family(model, config)
    old = read_layers(getattr(config, "attention_layers", None) or {"*": "ring"}, config.num_hidden_layers)
    written = write_layers(read_layers(layers, config.num_hidden_layers, old))
    config_class, model_class = mixed_classes(family)
    if config is model:
        config = copy.deepcopy(config)
        config.__class__ = config_class
        config.attention_layers = written
        return config
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ModelError(
            "convert: the model is partitioned by ZeRO-3; convert its config and give that to longctx.build, or "
            "convert the model before DeepSpeed partitions it"
        )
    for part in model.modules():
        if type(getattr(part, "config", None)) in (type(config), config_class):
            part.config.__class__ = config_class
            part.config.attention_layers = written
            part.config._attn_implementation = NAME
    model.__class__ = model_class
    attach_bounded_layers(model, config)
    return model


def converted(config: Any) -> bool:
    """Return whether a config is that of a converted model, which only longctx can compute."""
    return bool(getattr(config, "attention_layers", None)) and family_of(config) is not None


def _family(model: Any, config: Any) -> str:
    """Return the model type of ``model`` in ``FAMILIES``."""
    kind = getattr(config, "model_type", None)
    if not isinstance(kind, str):
        raise ModelError(f"convert: {type(model).__name__} is neither a transformers model nor the config of one")
    name = family_of(config)
    if name is None:
        near = difflib.get_close_matches(kind, FAMILIES, 1)
        hint = f" (the nearest is {near[0]})" if near else ""
        raise ModelError(f"convert: unknown family {kind!r}{hint}; it knows {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    if model is not config and not isinstance(model, MixedLayers) and type(model).__name__ != family.stem + family.head:
        raise ModelError(
            f"convert: got a {type(model).__name__}; of this family it converts {family.stem}{family.head}, or a config"
        )
    return name
