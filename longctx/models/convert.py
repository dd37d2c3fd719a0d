"""longctx.convert: choose for each layer of a transformers model how it attends, and keep its weights."""

from __future__ import annotations

import copy
import difflib
from typing import Any

from longctx.errors import ModelError
from longctx.models.hook.families import FAMILIES, MixedLayers, family_of, give_memories, mixed_classes
from longctx.models.names import NAME
from longctx.models.register import register
from longctx.nn.kinds import read_layers, write_layers


def convert(model: Any, layers: dict[Any, Any]) -> Any:
    """Swap how chosen layers of ``model`` attend, in place, and return it; a config is converted into a new one.

        longctx.convert(model, {"0-5": "ring", "6-11": {"abc": {"slots": 64}}, "3": "cosine", "4": {"window": 1024}})

    Kinds are ``ring`` (exact softmax, as it was), ``window``, ``abc`` and ``cosine``; docs/bounded_models.md lists
    their options. Projections, norms and rotary positions of every layer stay, under the same parameter names; ABC's
    control and Cottention's exponents are new, drawn from torch's generator. Converting again changes the layers that
    are named. The model becomes its family's ``Longctx…`` class: ``save_pretrained`` writes a folder that the Auto
    classes load once ``longctx.register()`` has been called.

    Args:
        model: a Llama, Mistral, Qwen 2 or 3 or GPT-2 causal language model, a BERT with its masked-word head, whole
            (not partitioned by ZeRO-3), or the config of one.
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
            "convert the model before DeepSpeed takes it apart"
        )
    for part in model.modules():
        if type(getattr(part, "config", None)) in (type(config), config_class):
            part.config.__class__ = config_class
            part.config.attention_layers = written
            part.config._attn_implementation = NAME
    model.__class__ = model_class
    give_memories(model, config)
    return model


def converted(config: Any) -> bool:
    """Tell whether a config (or a model's) has layers that only longctx computes."""
    return bool(getattr(config, "attention_layers", None)) and family_of(config) is not None


def _family(model: Any, config: Any) -> str:
    """Return the model type of ``model`` in ``FAMILIES``."""
    kind = getattr(config, "model_type", None)
    if not isinstance(kind, str):
        raise ModelError(f"convert: {type(model).__name__} is no transformers model and no config of one")
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
