"""A cache of layer inputs instead of keys and values, with the prompt once for all beams, in transformers' clothes."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticLayer

from longctx.errors import ModelError


class HiddenLayer(DynamicLayer):
    """The layer inputs (rows, S, C) that feed W_k and W_v; half of what keys and values of full width take.

    Beams of one prompt are ``beams`` equal rows side by side: the prompt is kept once for them, and only what they
    generated is kept for each. It sits where transformers keeps keys, (rows, 1, S, C), with values of width 0, so
    that reordering, cropping and selecting are transformers' own.
    """

    keys: Any  # transformers leaves them None until the first update
    values: Any

    def __init__(self, beams: int = 1) -> None:
        super().__init__()
        self.beams = beams
        self.prompt: torch.Tensor | None = None
        """(rows / beams, 1, S, C), or None: nothing is shared."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take (rows, 1, T, C); the first call brings the prompt."""
        if not self.is_initialized and self.beams > 1:
            self.prompt = key_states[:: self.beams].clone()
            key_states, value_states = key_states[:, :, :0], value_states[:, :, :0]
        return super().update(key_states, value_states, *args, **kwargs)

    def parts(self) -> list[torch.Tensor]:
        """What there is, in order: tensors (rows or rows / beams, S, C)."""
        shared = [] if self.prompt is None else [self.prompt[:, 0]]
        return shared + ([self.keys[:, 0]] if self.keys.shape[-2] or not shared else [])

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        if not self.is_initialized:
            return 0
        return self.keys.shape[-2] + (0 if self.prompt is None else self.prompt.shape[-2])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow a beam search, whose beams stay with their prompt; other orders take a copy of the prompt each."""
        if self.prompt is not None and self.beams > 1:
            home = torch.arange(len(beam_idx), device=beam_idx.device) // self.beams
            if not torch.equal(beam_idx // self.beams, home):
                self._unshare()
        super().reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        own = self.keys.shape[-2] if self.is_initialized else 0
        if self.prompt is not None and -tokens_to_remove > own:
            self.prompt = self.prompt[:, :, : tokens_to_remove + own]
            tokens_to_remove = -own
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Give every row ``repeats`` beams."""
        if self.get_seq_length():
            if self.prompt is None:
                self.prompt, self.keys, self.values = self.keys, self.keys[:, :, :0], self.values[:, :, :0]
                self.beams = 1
            self.keys, self.values = (x.repeat_interleave(repeats, 0) for x in (self.keys, self.values))
            self.beams *= repeats

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        self._unshare()
        super().batch_select_indices(indices)

    def reset(self) -> None:
        """Forget everything."""
        self.prompt = None
        super().reset()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = [x for x in (self.prompt, self.keys) if x is not None]
        return sum(x.untyped_storage().nbytes() for x in held)

    def _unshare(self) -> None:
        if self.prompt is not None:
            self.keys = torch.cat((self.prompt.repeat_interleave(self.beams, 0), self.keys), -2)
            self.values = self.keys[..., :0]
            self.prompt, self.beams = None, 1


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


def self_attention_cache(cache: Cache) -> Cache:
    """The part of a decoder's cache that its own tokens fill."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def share_prompt(cache: Cache, layers: list[int], beams: int) -> None:
    """Make ``layers`` of a fresh growing cache hidden-state layers with the prompt kept once for ``beams`` rows."""
    own = self_attention_cache(cache)
    if any(type(layer) is not DynamicLayer for layer in own.layers):
        return
    while len(own.layers) <= max(layers, default=-1):
        own.layers.append(DynamicLayer())
    for index in layers:
        own.layers[index] = HiddenLayer(beams)
