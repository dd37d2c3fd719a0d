"""Build transformers models under ZeRO-3: partitioned module by module, never complete on one rank.

transformers supports this (it gathers one module at a time to initialise it, and lets rank 0 read pretrained weights),
but reads the DeepSpeed configuration from a global that its Trainer sets. This is the only module that sets it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import wraps
from typing import Any

from longctx.errors import ModelError


class _Settings:
    """The interface that transformers expects of a DeepSpeed configuration (its own class needs accelerate)."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True


@contextlib.contextmanager
def partitioned_by(config: dict[str, Any]) -> Iterator[None]:
    """Partition models that are built or loaded in this context with ``deepspeed.zero.Init`` and this configuration."""
    from transformers.integrations import deepspeed

    settings = _Settings(config)  # transformers keeps a weak reference
    deepspeed.set_hf_deepspeed_config(settings)
    try:
        yield
    finally:
        deepspeed.unset_hf_deepspeed_config()


def allow_resizing(model: Any, config: dict[str, Any]) -> None:
    """Make ``model.resize_token_embeddings`` work on partitioned weights, in place. Collective when it is called.

    transformers gathers the weights that it resizes if its ZeRO-3 global is set; otherwise they look empty.

    Args:
        model: built within ``partitioned_by(config)``.
    """
    resize = model.resize_token_embeddings

    @wraps(resize)
    def resized(*arguments: Any, **keywords: Any) -> Any:
        whole = [name for name, p in model.named_parameters() if hasattr(p, "ds_numel") and p.numel() == p.ds_numel]
        if whole:  # DeepSpeed would repartition them by the old shape and silently drop the new rows
            raise ModelError(
                f"resize_token_embeddings: {whole[0]} is gathered; call it outside of deepspeed.zero.GatheredParameters"
            )
        with partitioned_by(config):
            return resize(*arguments, **keywords)

    model.resize_token_embeddings = resized


def draw_weights(model: Any, partitioned: bool) -> None:
    """Initialise weights again, module by module in fixed order, so that they depend only on the generator's state."""
    for part in (*model.modules(), *model.parameters()):
        part._is_hf_initialized = False  # otherwise initialised weights are kept
    if partitioned:
        from transformers.integrations.deepspeed import initialize_weights_zero3

        initialize_weights_zero3(model)  # on rank 0, which broadcasts it
    else:
        model.initialize_weights()
    model.tie_weights()
