"""recompute_layers: choose what a transformers model's layers recompute in backward instead of saving it."""

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
    """Make ``model`` recompute by ``policy`` in training, in place.

    Args:
        policy: "layer" saves each layer's input (B, T, width) only; "layer_keep_attention" also its attention output,
            so that backward does not repeat ring hops; "none" and "mlp" checkpoint no layer.
        store: offloads what is saved; None leaves it on its device.

    Raises:
        ModelError: an unknown policy, layers that transformers cannot checkpoint, or a store without checkpoints.
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
    """Checkpoint ``function`` with its inputs in ``store``; tensors saved inside are the checkpoint's own."""
    with store.layer(), saved_tensors_hooks(store.put_input, store.take_input):
        return checkpoint(function, *inputs)
