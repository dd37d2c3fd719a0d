"""The transformers classes of models whose layers are not all alike: `longctx_llama` and its sisters.

Each is its family's own class with two things more: a config that says which kind of attention each layer has
(``attention_layers``), and the few weights that those kinds bring. They are registered with transformers' Auto
classes, so ``save_pretrained`` and ``from_pretrained`` work with no code in the folder; a transformers that does not
know longctx refuses the model type instead of dropping what makes the model what it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch

from longctx.errors import ModelError
from longctx.models.hook.bounded_layer import install
from longctx.models.names import NAME, PREFIX
from longctx.nn.kinds import read_layers
from longctx.nn.memory import ABCMemory, CosineMemory


@dataclass(frozen=True)
class Family:
    """Where a family of transformers keeps what we need."""

    stem: str  # of its classes: LlamaConfig, LlamaForCausalLM
    head: str
    attention: str  # path of a layer's attention module, below the model with its head

    @property
    def masked(self) -> bool:
        """It is an encoder, trained by filling in masked tokens."""
        return self.head == "ForMaskedLM"


FAMILIES = {
    "llama": Family("Llama", "ForCausalLM", "model.layers.{}.self_attn"),
    "mistral": Family("Mistral", "ForCausalLM", "model.layers.{}.self_attn"),
    "qwen2": Family("Qwen2", "ForCausalLM", "model.layers.{}.self_attn"),
    "qwen3": Family("Qwen3", "ForCausalLM", "model.layers.{}.self_attn"),
    "gpt2": Family("GPT2", "LMHeadModel", "transformer.h.{}.attn"),
    "bert": Family("Bert", "ForMaskedLM", "bert.encoder.layer.{}.attention.self"),
}
"""transformers model type -> family; every one is tested"""


def family_of(config: Any) -> str | None:
    """Return the model type in ``FAMILIES`` of a transformers config, converted or not; None if it has none."""
    name = config.model_type.removeprefix(PREFIX)
    return name if name in FAMILIES else None


class MemoryWeights:
    """What a transformers model with memories in it knows besides: how their weights begin."""

    def _init_weights(self, module: torch.nn.Module) -> None:
        from transformers import initialization as init

        if isinstance(module, ABCMemory):
            for weight in module.parameters(recurse=False):
                init.normal_(weight, mean=0.0, std=module.initial_std)
        elif isinstance(module, CosineMemory):
            init.constant_(module.exponent, module.kind.exponent)
        else:
            super()._init_weights(module)  # type: ignore[misc]


class MixedLayers(MemoryWeights):
    """What every converted model adds to its family's class."""

    config: Any

    def __init__(self, config: Any, *arguments: Any, **keywords: Any) -> None:
        super().__init__(config, *arguments, **keywords)  # type: ignore[call-arg]
        give_memories(self, config)

    def _check_and_adjust_attn_implementation(self, implementation: str | None, *others: Any, **keywords: Any) -> str:
        if implementation not in (None, NAME):
            raise ModelError(
                f"attn_implementation={implementation!r}: {type(self).__name__} has layers that only longctx computes; "
                "leave attn_implementation out"
            )
        return super()._check_and_adjust_attn_implementation(NAME, *others, **keywords)  # type: ignore[misc]


def give_memories(model: Any, config: Any) -> None:
    """Give the layers of ``model`` the memories of ``config``, and its inner models the knowledge of their weights."""
    from transformers import PreTrainedModel

    install(model, config, FAMILIES[family_of(config) or ""].attention)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and not isinstance(part, MemoryWeights):
            plain: Any = type(part)
            part.__class__ = with_memory_weights(plain)


@cache
def with_memory_weights(plain: type) -> type:
    """Return the class of an inner model (LlamaModel) of a converted one."""
    made = type(f"Longctx{plain.__name__}", (MemoryWeights, plain), {"__module__": __name__})
    globals()[made.__name__] = made  # where pickle looks for it
    return made


@cache
def plain_classes(model_type: str) -> tuple[type, type]:
    """Return transformers' own (config class, model class) of a family."""
    family = FAMILIES[model_type]
    package = f"transformers.models.{model_type}"
    config = getattr(import_module(f"{package}.configuration_{model_type}"), f"{family.stem}Config")
    return config, getattr(import_module(f"{package}.modeling_{model_type}"), family.stem + family.head)


@cache
def mixed_classes(model_type: str) -> tuple[type, type]:
    """Return our (config class, model class) of a family, the same objects every time."""
    plain_config, plain_model = plain_classes(model_type)
    config = type(f"Longctx{plain_config.__name__}", (plain_config,), {
        "__module__": __name__, "__doc__": "A config whose ``attention_layers`` says what each layer is.",
        "__annotations__": {"attention_layers": dict | None}, "attention_layers": None,
        "model_type": PREFIX + model_type, "__post_init__": _check_layers,
    })  # fmt: skip
    model = type(f"Longctx{plain_model.__name__}", (MixedLayers, plain_model), {
        "__module__": __name__, "__doc__": MixedLayers.__doc__, "config_class": config,
        "__annotations__": {"config": config},
    })  # fmt: skip
    globals().update({made.__name__: made for made in (config, model)})  # where pickle looks for them
    return config, model


def _check_layers(self: Any, **keywords: Any) -> None:
    mixed: Any = mixed_classes(self.model_type.removeprefix(PREFIX))[0]
    super(mixed, self).__post_init__(**keywords)
    if self.attention_layers:
        read_layers(self.attention_layers, self.num_hidden_layers)


def register_families() -> None:
    """Make the mixed models known to AutoConfig, AutoModelForCausalLM and AutoModelForMaskedLM (idempotent)."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    for model_type, family in FAMILIES.items():
        config, model = mixed_classes(model_type)
        auto: Any = AutoModelForMaskedLM if family.masked else AutoModelForCausalLM
        AutoConfig.register(config.model_type, config, exist_ok=True)  # type: ignore[attr-defined]
        auto.register(config, model, exist_ok=True)
