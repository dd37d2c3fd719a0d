"""Build transformers models under ZeRO-3, partitioned module by module and never whole on a rank.

transformers supports this (it gathers one module at a time to draw random weights, and rank 0 reads pretrained ones),
but takes the DeepSpeed configuration from a global variable that its Trainer sets. Here is the only place that sets it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import wraps
from typing import Any

from longctx.errors import ModelError


class _Settings:
    """The interface through which transformers queries a DeepSpeed configuration (its own class needs accelerate)."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True


@contextlib.contextmanager
def partitioned_by(config: dict[str, Any]) -> Iterator[None]:
    """Within the block, models are constructed and loaded under ``deepspeed.zero.Init`` with this configuration."""
    from transformers.integrations import deepspeed

    settings = _Settings(config)  # transformers keeps a weak reference only
    deepspeed.set_hf_deepspeed_config(settings)
    try:
        yield
    finally:
        deepspeed.unset_hf_deepspeed_config()


def allow_resizing(model: Any, config: dict[str, Any]) -> None:
    """Make ``model.resize_token_embeddings`` work on partitioned weights, in place; calling it is then collective.

    transformers gathers the weights only while the configuration of ZeRO-3 is set; otherwise they look empty to it.

    Args:
        model: made within ``partitioned_by(config)``.
    """
    resize = model.resize_token_embeddings

    @wraps(resize)
    def resized(*arguments: Any, **keywords: Any) -> Any:
        whole = [name for name, p in model.named_parameters() if hasattr(p, "ds_numel") and p.numel() == p.ds_numel]
        if whole:  # DeepSpeed would partition them by the old shape, and silently drop the new rows
            raise ModelError(
                f"resize_token_embeddings: {whole[0]} is gathered; call it outside of deepspeed.zero.GatheredParameters"
            )
        with partitioned_by(config):
            return resize(*arguments, **keywords)

    model.resize_token_embeddings = resized


def draw_weights(model: Any, partitioned: bool) -> None:
    """Draw random weights again, in a fixed order of modules, so that they depend on the generator's state only."""
    for part in (*model.modules(), *model.parameters()):
        part._is_hf_initialized = False  # otherwise transformers skips weights that were drawn before
    if partitioned:
        from transformers.integrations.deepspeed import initialize_weights_zero3

        initialize_weights_zero3(model)  # draws on rank 0 and broadcasts
    else:
        model.initialize_weights()
    model.tie_weights()
