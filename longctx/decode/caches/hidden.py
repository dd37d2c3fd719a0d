"""A cache of layer inputs (EL-attention) instead of keys and values, with transformers' interface."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from longctx.decode.caches.prompt import PromptLayer
from longctx.errors import ModelError


class HiddenLayer(PromptLayer):
    """One layer's inputs of W_k and W_v: half the bytes of keys and values if G * D = C.

    They are stored as keys, (rows, 1, S, C), with values of width 0.
    """

    def parts(self) -> list[torch.Tensor]:
        """Return the cached inputs in order: tensors (rows / beams, S, C) of a shared prompt, (rows, S, C) else."""
        shared = [] if self.prompt is None else [self.prompt[0][:, 0]]
        return shared + ([self.keys[:, 0]] if self.keys.shape[-2] or not shared else [])


def append_hidden(cache: Cache, hidden: torch.Tensor, layer: int) -> tuple[int, list[torch.Tensor]]:
    """Append layer inputs (rows, T, C) to one layer of a cache.

    Transformers' growing and static caches store them as keys, with values of width 0.

    Returns:
        the number of tokens cached before, and all inputs in order, as tensors (rows or rows / beams, S, C).

    Raises:
        ModelError: the cache changes what it stores (quantised, sliding).
    """
    past = int(cache.get_seq_length(layer))
    states = hidden[:, None]
    cache.update(states, states[..., :0], layer)
    held: Any = cache.layers[layer]
    if isinstance(held, HiddenLayer):
        return past, held.parts()
    if type(held) not in (DynamicLayer, StaticLayer):
        raise ModelError(
            f"a cache of {type(held).__name__} cannot hold hidden states; generate with cache_implementation 'dynamic' "
            "or 'static', or call longctx.disable_el(model)"
        )
    return past, [held.keys[:, 0, : past + hidden.shape[1]]]
