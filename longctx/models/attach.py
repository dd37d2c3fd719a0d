"""attach_attention(): tell every attention module of a model which mesh it works on."""

from __future__ import annotations

import re
from typing import Any

import torch

from longctx.errors import ModelError
from longctx.layout import get_layout
from longctx.mesh import Mesh
from longctx.models.binding import Binding, binding_of
from longctx.models.dropout import drops_attention
from longctx.models.register import NAME, register
from longctx.models.rope import attach_rope
from longctx.models.verify import watch
from longctx.models.wrapped import inner_models, refuse_prompts

# Heads that pick or compare tokens of the whole sequence: on a shard each rank would pick among its own.
_GLOBAL_HEADS = re.compile(
    r"For(SequenceClassification|MultipleChoice|NextSentencePrediction|QuestionAnswering)|DoubleHeads"
)


def attach_attention(model: torch.nn.Module, mesh: Mesh, layout: str = "zigzag") -> None:
    """Make ``model`` attend over ``mesh``: write mesh and layout onto its modules, and choose longctx's attention.

    Sets ``_attn_implementation = "longctx"`` and ``use_cache = False`` on the model's config and every nested one. The
    first forward then checks that every layer really goes through longctx. Attaching again replaces mesh and layout.

    Args:
        model: a transformers model, or a module that holds one.

    Raises:
        ModelError: no transformers model inside, or one that a sharded sequence would get silently wrong.
        LayoutError: an unknown layout.
    """
    get_layout(layout)
    register()
    configs = _configs(model)
    if not configs:
        raise ModelError(f"{type(model).__name__} holds no module with a transformers config; give it such a model")
    names = dict.fromkeys(type(part).__name__ for part in (model, *inner_models(model)))
    binding = Binding(mesh, layout, drops=any(drops_attention(config) for config in configs))
    if binding.sharded:
        refuse_prompts(model)
    for config in configs:
        if binding.sharded:
            for name in names:
                _refuse(name, config)
        config._attn_implementation = NAME
        config.use_cache = False
    detach_attention(model)
    binding.bind(model)
    attach_rope(model, binding)
    watch(model, binding)


def detach_attention(model: torch.nn.Module) -> None:
    """Remove the hooks and the mesh of an earlier ``attach_attention``, if any."""
    old = binding_of(model)
    if old is not None:
        for handle in old.handles:
            handle.remove()
        old.handles.clear()


def _configs(model: torch.nn.Module) -> list[Any]:
    """Return every transformers config of the model's modules, each once."""
    from transformers import PreTrainedConfig

    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            found[id(config)] = config
            for name in config.sub_configs:
                nested = getattr(config, name, None)
                if isinstance(nested, PreTrainedConfig):
                    found[id(nested)] = nested
    return list(found.values())


def _refuse(name: str, config: Any) -> None:
    if _GLOBAL_HEADS.search(name):
        raise ModelError(
            f"{name} picks tokens of the whole sequence, and on a shard it would pick among its own: use the model "
            "with a head per token (ForCausalLM, ForMaskedLM, ForTokenClassification)"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; longctx shards decoders and encoders only")
    if getattr(config, "output_router_logits", False):
        raise ModelError(
            f"{name}: output_router_logits adds a load-balancing loss over the local tokens only, which is not that "
            "of the whole sequence; set output_router_logits=False"
        )
