"""recompute: what of a transformers model's layers backward computes anew instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from torch.autograd.graph import saved_tensors_hooks

from longctx.attention.replay import keep_attention
from longctx.errors import ModelError
from longctx.models.activations.host import HostStore

Policy = Literal["none", "mlp", "layer", "layer_keep_attention"]


def recompute_layers(model: Any, policy: Policy, store: HostStore | None = None) -> None:
    """Have ``model`` recompute by ``policy`` in training, in place.

    Args:
        policy: "layer": of each layer only its input (B, T, width) is kept. "layer_keep_attention": the result of its
            attention as well, so that backward never repeats the ring's hops. "none" and "mlp" checkpoint no layer.
        store: where that waits for backward; on its device when None.

    Raises:
        ModelError: an unknown policy, a model without layers that transformers can checkpoint, or a store and no such
            layers.
    """
    if policy not in get_args(Policy):
        raise ModelError(f"recompute={policy!r}: one of {', '.join(get_args(Policy))}")
    if policy in ("none", "mlp"):
        if store is not None:
            raise ModelError(
                f"offload_checkpoints with recompute={policy!r}: there are no checkpoints; choose layer_keep_attention"
            )
        return
    keywords: dict[str, Any] = {"use_reentrant": False}
    if policy == "layer_keep_attention":
        keywords["context_fn"] = partial(keep_attention, store)
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ModelError(
            f"recompute={policy!r}: transformers cannot checkpoint layers of {type(model).__name__}; use none or mlp"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
    if store is not None:
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = partial(_stored, store, module._gradient_checkpointing_func)


def _stored(store: HostStore, checkpoint: Callable[..., Any], function: Any, *inputs: Any) -> Any:
    """Checkpoint ``function`` with its inputs in ``store``; what is saved inside is the checkpoint's own affair."""
    with store.layer(), saved_tensors_hooks(store.put_input, store.take_input):
        return checkpoint(function, *inputs)
