"""A cache of layer inputs instead of keys and values, with transformers' interface."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from longctx.decode.caches.prompt import PromptLayer
from longctx.errors import ModelError


class HiddenLayer(PromptLayer):
    """The layer inputs (rows, S, C) that feed W_k and W_v; half of what keys and values of full width take.

    They sit where keys do, (rows, 1, S, C), with values of width 0.
    """

    def parts(self) -> list[torch.Tensor]:
        """What there is, in order: tensors (rows or rows / beams, S, C)."""
        shared = [] if self.prompt is None else [self.prompt[0][:, 0]]
        return shared + ([self.keys[:, 0]] if self.keys.shape[-2] or not shared else [])


def append_hidden(cache: Cache, hidden: torch.Tensor, layer: int) -> tuple[int, list[torch.Tensor]]:
    """Put (rows, T, C) into a cache that generate() made or a user gave; return what it holds.

    Growing and static caches of transformers take the inputs in the place of keys, with values of width 0.

    Returns:
        how many tokens were there before, and the parts in order, (rows or rows / beams, S, C).

    Raises:
        ModelError: the cache rewrites what it is given (quantised, sliding).
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
