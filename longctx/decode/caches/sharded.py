"""A cache of keys and values that is spread over the ranks of a mesh, in transformers' clothes."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from longctx.decode.sharded import Places, attend_part, merge_over_ranks
from longctx.errors import ModelError
from longctx.mesh import Mesh


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
