"""Caches for transformers' generate(): a layer's inputs instead of keys and values, the prompt once for all beams."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache, StaticLayer

from longctx.decode.sharded import Places, attend_part, merge_over_ranks
from longctx.errors import ModelError
from longctx.mesh import Mesh


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


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds."""
    if isinstance(cache, EncoderDecoderCache):
        return cache_bytes(cache.self_attention_cache) + cache_bytes(cache.cross_attention_cache)
    total = 0
    layer: Any
    for layer in cache.layers:
        if isinstance(layer, HiddenLayer):
            total += layer.nbytes
        elif getattr(layer, "is_initialized", False):
            total += sum(x.untyped_storage().nbytes() for x in (layer.keys, layer.values))
    return total


class ShardedLayer(CacheLayerMixin):
    """One layer's keys and values of the tokens that this rank holds; its length is that of the whole context."""

    is_sliding = False
    is_croppable = True
    keys: Any
    values: Any

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places, self.seen = places, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take the prompt's keys and values as they lie on this rank."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values, self.seen = key_states, value_states, self.places.prompt
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take (B, G, T, D): first the local part of the prompt, then new tokens, of which every rank keeps its own."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        mine = self.places.owned(self.seen, self.seen + key_states.shape[2])
        self.seen += key_states.shape[2]
        if mine:
            index = torch.tensor(mine, device=self.device)
            self.keys = torch.cat((self.keys, key_states.index_select(2, index)), 2)
            self.values = torch.cat((self.values, value_states.index_select(2, index)), 2)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens of the whole context so far."""
        return self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset) of the whole context with the tokens to come."""
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` of the tokens that came after the prompt."""
        kept = self.seen + tokens_to_remove
        if kept < self.places.prompt:
            raise ModelError(
                f"crop({tokens_to_remove}) of a sharded cache: only the {self.seen - self.places.prompt} tokens after "
                "the prompt can be forgotten"
            )
        surplus = len(self.places.owned(kept, self.seen))
        self.keys, self.values = (x[:, :, : x.shape[2] - surplus] for x in (self.keys, self.values))
        self.seen = kept

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.keys, self.values = (x.index_select(0, rows) for x in (self.keys, self.values))


class ShardedCache(Cache):
    """Keys and values of a context spread over the ranks of a mesh: no rank holds more than its part.

    The prompt stays where ring attention left it; new tokens go to the ranks in turn.
    """

    def __init__(self, mesh: Mesh, layers: int, places: Places) -> None:
        super().__init__(layers=[ShardedLayer(places) for _ in range(layers)])
        self.mesh, self.places = mesh, places
        self.ready = False
        """The prompt is in: attention reads the cache from here on."""

    @property
    def filled(self) -> bool:
        """Every layer has its part of the prompt."""
        return all(isinstance(layer, ShardedLayer) and layer.is_initialized for layer in self.layers)

    def attend(
        self, layer: int, q: torch.Tensor, *, window: int | None, sink: torch.Tensor | None, **scores: Any
    ) -> Any:
        """Attention of q (B, H, T, D), the last T tokens of the context, to all of it; (B, H, T, Dv) in q's dtype."""
        held: Any = self.layers[layer]
        visible = self.places.visible(held.seen, q.shape[2], window)
        first = self.mesh.sequence_rank == 0  # a sink is one more logit, once
        part = attend_part(q, held.keys, held.values, visible, sink=sink if first else None, **scores)
        return merge_over_ranks(part, self.mesh)[0].to(q.dtype)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follow a beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        self.places.documents = self.places.documents.index_select(0, indices)
        for layer in self.layers:
            layer.select(indices)  # type: ignore[union-attr]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Give every row ``repeats`` beams."""
        rows = torch.arange(self.places.documents.shape[0], device=self.places.documents.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))
