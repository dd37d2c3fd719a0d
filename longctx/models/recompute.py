"""recompute: what of a transformers model's layers backward computes anew instead of keeping it."""

from __future__ import annotations

from typing import Any, Literal, get_args

from longctx.attention.replay import keep_attention
from longctx.errors import ModelError

Policy = Literal["none", "mlp", "layer", "layer_keep_attention"]


def recompute_layers(model: Any, policy: Policy) -> None:
    """Have ``model`` recompute by ``policy`` in training, in place.

    Args:
        policy: "layer": of each layer only its input (B, T, width) is kept. "layer_keep_attention": the result of its
            attention as well, so that backward never repeats the ring's hops. "none" and "mlp" checkpoint no layer.

    Raises:
        ModelError: an unknown policy, or a model without layers that transformers can checkpoint.
    """
    if policy not in get_args(Policy):
        raise ModelError(f"recompute={policy!r}: one of {', '.join(get_args(Policy))}")
    if policy in ("none", "mlp"):
        return
    keywords: dict[str, Any] = {"use_reentrant": False}
    if policy == "layer_keep_attention":
        keywords["context_fn"] = keep_attention
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ModelError(
            f"recompute={policy!r}: transformers cannot checkpoint layers of {type(model).__name__}; use none or mlp"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
