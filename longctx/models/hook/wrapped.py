"""Find the transformers model inside a wrapper: PEFT adapters, a value head, a user's module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from longctx.errors import ModelError

_BASE = "base_layer"  # name of the wrapped layer in a PEFT adapter layer


def inner_models(module: torch.nn.Module) -> list[Any]:
    """Return the outermost transformers models in ``module``, itself included."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        return [module]
    return [found for child in module.children() for found in inner_models(child)]


def inner_model(module: Any) -> Any:
    """Return the transformers model in ``module``, or ``module`` itself if there are none or several."""
    found = inner_models(module) if isinstance(module, torch.nn.Module) else []
    return found[0] if len(found) == 1 else module


def adapter_parts(model: torch.nn.Module) -> set[int]:
    """Return the ids of all modules that adapters have added, which act per token like the layers they wrap.

    The wrapped layers themselves, ``base_layer``, are not included.
    """
    return {id(part) for added in _added(model) for part in added.modules()}


def _added(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for module in model.modules():
        if isinstance(getattr(module, _BASE, None), torch.nn.Module):
            yield from (child for name, child in module.named_children() if name != _BASE)


def refuse_prompts(model: Any) -> None:
    """Raise for PEFT methods that prepend virtual tokens, which every rank would do to its shard.

    Raises:
        ModelError: prompt, prefix or P-tuning, or LLaMA-Adapter.
    """
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "is_prompt_learning", False) or kind == "ADAPTION_PROMPT":
            raise ModelError(
                f"{type(model).__name__} cannot run on a shard: its adapter {name!r} ({kind}) prepends virtual tokens "
                "to the row, which every rank would do to its own shard. Use LoRA, DoRA, trainable tokens or "
                "another adapter of weights"
            )
