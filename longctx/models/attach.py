"""attach_attention(): bind every attention module of a model to a mesh."""

from __future__ import annotations

import inspect
import re
from functools import partial
from typing import Any

import torch

from longctx.errors import ModelError
from longctx.layout import get_layout
from longctx.mesh import Mesh
from longctx.models.hook.binding import Binding, binding_of
from longctx.models.hook.dropout import drops_attention
from longctx.models.hook.rope import attach_rope
from longctx.models.hook.verify import refuse_added_loss, watch
from longctx.models.hook.wrapped import inner_models, refuse_prompts
from longctx.models.names import NAME
from longctx.models.register import register

# Heads that select or compare tokens of the whole sequence; on a shard each rank would select among its own.
_GLOBAL_HEADS = re.compile(
    r"For(SequenceClassification|MultipleChoice|NextSentencePrediction|QuestionAnswering)|DoubleHeads"
)


def attach_attention(model: torch.nn.Module, mesh: Mesh, layout: str = "zigzag") -> None:
    """Bind ``model`` to ``mesh`` and ``layout``, and select longctx's attention.

    Sets ``_attn_implementation = "longctx"`` on the model's config and every nested one; a forward keeps no cache
    unless it is called with ``use_cache=True``. The first forward verifies that every layer uses longctx. Attaching
    again replaces mesh and layout. What ``save_pretrained`` writes does not change.

    Args:
        model: a transformers model, or a module that contains one.

    Raises:
        ModelError: no transformers model inside, or one that would be wrong on a sharded sequence.
        LayoutError: an unknown layout.
    """
    get_layout(layout)
    register()
    configs = _configs(model)
    if not configs:
        raise ModelError(f"{type(model).__name__} holds no module with a transformers config; give it such a model")
    names = dict.fromkeys(type(part).__name__ for part in (model, *inner_models(model)))
    binding = Binding(mesh, layout, drops=any(drops_attention(config) for config in configs), configs=configs)
    if binding.sharded:
        refuse_prompts(model)
    for config in configs:
        if binding.sharded:
            for name in names:
                _refuse(name, config)
        config._attn_implementation = NAME
    if binding.sharded:
        refuse_added_loss(type(model).__name__, {}, configs)
    detach_attention(model)
    binding.bind(model)
    mesh.add_model(model)
    _keep_no_cache(model, binding)
    attach_rope(model, binding)
    watch(model, binding)


def detach_attention(model: torch.nn.Module) -> None:
    """Remove the hooks of an earlier ``attach_attention``, if any."""
    old = binding_of(model)
    if old is not None:
        for handle in old.handles:
            handle.remove()
        old.handles.clear()


def _keep_no_cache(model: torch.nn.Module, binding: Binding) -> None:
    """Make ``use_cache=False`` the default of every transformers model inside, without changing its config.

    With False in its config, an exported model would generate without a cache.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        names = list(inspect.signature(module.forward).parameters) if isinstance(module, PreTrainedModel) else []
        if "use_cache" in names:
            hook = partial(_without_cache, names.index("use_cache"))
            binding.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))


def _without_cache(position: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Add ``use_cache=False`` in a forward pre-hook, unless the caller sets it by name or at ``position``."""
    if len(args) > position or kwargs.get("use_cache") is not None:
        return None
    return args, {**kwargs, "use_cache": False}


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
            f"{name} selects tokens of the whole sequence, but on a shard would select among its own: use the model "
            "with a head per token (ForCausalLM, ForMaskedLM, ForTokenClassification)"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; longctx shards decoders and encoders only")
