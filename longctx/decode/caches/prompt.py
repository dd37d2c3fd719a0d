"""A growing cache with transformers' interface that stores a prompt once for all of its beams."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache


class PromptLayer(DynamicLayer):
    """Keys and values (rows, G, S, D), with the prompt's stored once per ``beams`` rows.

    Generated tokens are in `keys` and `values` as in a DynamicLayer, whose methods reorder, crop and select them.
    """

    keys: Any  # transformers leaves them None until the first update
    values: Any

    def __init__(self, beams: int = 1) -> None:
        super().__init__()
        self.beams = beams
        self.prompt: tuple[torch.Tensor, torch.Tensor] | None = None
        """Keys and values (rows / beams, G, S, D); None: nothing is shared."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append (rows, G, T, D); the first call passes the prompt, which is equal for the beams of a row."""
        if self.is_initialized or self.beams == 1:
            super().update(key_states, value_states, *args, **kwargs)
            self.keys.longctx_prompt = self.prompt  # where attention to these keys looks for the prompt
            return self.keys, self.values
        self.prompt = key_states[:: self.beams].clone(), value_states[:: self.beams].clone()
        super().update(key_states[:, :, :0], value_states[:, :, :0], *args, **kwargs)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return the number of tokens in the cache."""
        if not self.is_initialized:
            return 0
        return self.keys.shape[-2] + (0 if self.prompt is None else self.prompt[0].shape[-2])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows; the prompt stays shared if every row keeps its prompt, and is copied otherwise."""
        if self.prompt is not None and self.beams > 1:
            prompt_of_row = torch.arange(len(beam_idx), device=beam_idx.device) // self.beams
            if not torch.equal(beam_idx // self.beams, prompt_of_row):
                self.unshare()
        super().reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens, of the prompt too if there are no others left."""
        own = self.keys.shape[-2] if self.is_initialized else 0
        if self.prompt is not None and -tokens_to_remove > own:
            keys, values = self.prompt
            self.prompt = keys[:, :, : tokens_to_remove + own], values[:, :, : tokens_to_remove + own]
            tokens_to_remove = -own
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, as beams that share its prompt."""
        if self.get_seq_length():
            if self.prompt is None:
                self.prompt, self.beams = (self.keys, self.values), 1
                self.keys, self.values = self.keys[:, :, :0], self.values[:, :, :0]
            self.keys, self.values = (x.repeat_interleave(repeats, 0) for x in (self.keys, self.values))
            self.beams *= repeats

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows; the prompt is no longer shared."""
        self.unshare()
        super().batch_select_indices(indices)

    def reset(self) -> None:
        """Empty the cache."""
        self.prompt = None
        super().reset()

    @property
    def nbytes(self) -> int:
        """Bytes cached."""
        held = [x for x in (*(self.prompt or ()), self.keys, self.values) if x is not None]
        return sum(x.untyped_storage().nbytes() for x in held if x.numel())

    def unshare(self) -> None:
        """Give every row its own copy of the prompt."""
        if self.prompt is not None:
            prompt = (x.repeat_interleave(self.beams, 0) for x in self.prompt)
            self.keys, self.values = (
                torch.cat(both, -2) for both in zip(prompt, (self.keys, self.values), strict=True)
            )  # fmt: skip
            self.prompt, self.beams = None, 1


class SourceLayer(DynamicLayer):
    """Keys and values of an encoder's output, (B, H, S, D), stored once for all beams of a row."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Do nothing: beams keep their source."""


def self_attention_cache(cache: Cache) -> Cache:
    """Return the part of a cache that contains the decoder's own tokens."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def use_layers(cache: Cache, layers: list[int], kind: type[PromptLayer], beams: int) -> None:
    """Replace ``layers`` of an empty growing cache by layers that share the prompt; leave other caches unchanged."""
    own = self_attention_cache(cache)
    if any(type(layer) is not DynamicLayer for layer in own.layers):
        return
    while len(own.layers) <= max(layers, default=-1):
        own.layers.append(DynamicLayer())
    for index in layers:
        own.layers[index] = kind(beams)
