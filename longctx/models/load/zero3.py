"""Build transformers models under ZeRO-3: partitioned module by module, never whole on a rank.

transformers knows how (it gathers a module at a time for its random weights, and lets rank 0 read pretrained ones), but
learns of the DeepSpeed configuration from a global that its Trainer sets. This is the one place where we set it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import wraps
from typing import Any

from longctx.errors import ModelError


class _Settings:
    """What transformers asks of a DeepSpeed configuration (its own class for it wants accelerate)."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True


@contextlib.contextmanager
def partitioned_by(config: dict[str, Any]) -> Iterator[None]:
    """Have models that are made or loaded within partitioned by ``deepspeed.zero.Init`` with this configuration."""
    from transformers.integrations import deepspeed

    settings = _Settings(config)  # transformers holds it weakly
    deepspeed.set_hf_deepspeed_config(settings)
    try:
        yield
    finally:
        deepspeed.unset_hf_deepspeed_config()


def allow_resizing(model: Any, config: dict[str, Any]) -> None:
    """Have ``model.resize_token_embeddings`` work on partitioned weights, in place. Collective when it is called.

    transformers gathers what it resizes if it knows of ZeRO-3; without that it takes the weights for empty.

    Args:
        model: what was made within ``partitioned_by(config)``.
    """
    resize = model.resize_token_embeddings

    @wraps(resize)
    def resized(*arguments: Any, **keywords: Any) -> Any:
        whole = [name for name, p in model.named_parameters() if hasattr(p, "ds_numel") and p.numel() == p.ds_numel]
        if whole:  # DeepSpeed would cut them by the old shape again, and drop the new rows without a word
            raise ModelError(
                f"resize_token_embeddings: {whole[0]} is gathered; call it outside of deepspeed.zero.GatheredParameters"
            )
        with partitioned_by(config):
            return resize(*arguments, **keywords)

    model.resize_token_embeddings = resized


def draw_weights(model: Any, partitioned: bool) -> None:
    """Draw random weights anew, module by module in one order, so that they depend on the generator's state alone."""
    for part in (*model.modules(), *model.parameters()):
        part._is_hf_initialized = False  # else what has been drawn once is kept
    if partitioned:
        from transformers.integrations.deepspeed import initialize_weights_zero3

        initialize_weights_zero3(model)  # on rank 0, which the other ranks receive it from
    else:
        model.initialize_weights()
    model.tie_weights()
