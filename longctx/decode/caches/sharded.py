"""A cache, with transformers' interface, of a context that is sharded over the ranks of a mesh.

Layers keep what their attention needs: keys and values, or layer inputs (EL), of the tokens that lie on this rank; or a
bounded state of the whole context, which has the same size on every rank whatever the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from longctx.attention.merge import merge
from longctx.decode.caches.state import StateLayer
from longctx.decode.sharded import Places, attend_part, merge_over_ranks
from longctx.errors import ModelError
from longctx.mesh import Mesh


class ShardedLayer(CacheLayerMixin):
    """One layer's keys and values of the tokens that this rank holds; its length is that of the whole context.

    The prompt stays as it lay, once for all beams of a row; what is generated lies behind it, a row for every beam.
    """

    is_sliding = False
    is_croppable = True
    keys: Any
    values: Any
    prompt: tuple[torch.Tensor, torch.Tensor]
    """(B, G, S, D) and (B, G, S, Dv); keys and values hold (B * beams, G, n, D) new tokens."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places, self.seen = places, 0
        self.forgotten = -1
        """The last of the positions that a sliding window has passed: nothing up to there is held any more."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take the prompt's keys and values as they lie on this rank."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.prompt, self.seen = (key_states, value_states), self.places.prompt
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
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
        if self.forgotten >= 0:
            raise ModelError(
                f"crop({tokens_to_remove}) of a sharded cache whose sliding window has passed its first tokens: those "
                "that would come back into sight are no longer there; generate again"
            )
        surplus = len(self.places.owned(kept, self.seen))
        self.keys, self.values = (x[:, :, : x.shape[2] - surplus] for x in (self.keys, self.values))
        self.seen = kept

    def forget(self, window: int) -> None:
        """Drop the keys that neither the newest token nor any later one sees through ``window``."""
        passed = self.seen - 1 - window
        if passed <= self.forgotten:
            return
        keys, values = self.prompt
        if keys.shape[2]:
            gone = int((self.places.positions <= passed).long().cumprod(0).sum())  # places ascend on a rank
            left = len(self.places.positions) - gone
            if left < keys.shape[2]:
                self.prompt = keys[:, :, keys.shape[2] - left :].clone(), values[:, :, keys.shape[2] - left :].clone()
        left = len(self.places.owned(max(passed + 1, self.places.prompt), self.seen))
        if left < self.keys.shape[2]:
            self.keys, self.values = (x[:, :, x.shape[2] - left :].clone() for x in (self.keys, self.values))
        self.forgotten = passed

    def select(self, rows: torch.Tensor, prompts: torch.Tensor | None) -> None:
        """Keep these rows of the new tokens, in this order, and these of the prompt (None: the prompt as it is)."""
        self.keys, self.values = (x.index_select(0, rows) for x in (self.keys, self.values))
        if prompts is not None:
            keys, values = self.prompt
            self.prompt = keys.index_select(0, prompts), values.index_select(0, prompts)

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds."""
        held = (*self.prompt, self.keys, self.values) if self.is_initialized else ()
        return sum(x.untyped_storage().nbytes() for x in held if x.numel())


class ShardedHidden(ShardedLayer):
    """One layer's inputs (rows, 1, S, C) in the place of keys, with values of width 0: what EL-attention reads."""


class ReplicatedState(StateLayer):
    """A bounded state of the whole context, the same on every rank, which all ranks carry on alike after the prompt."""

    def __init__(self, places: Places, tokens: torch.Tensor) -> None:
        """Expect a prompt with these numbers of ``tokens``, (B,) int64, that are no padding."""
        super().__init__()
        self.places = places
        self.position, self.document = tokens - 1, torch.zeros_like(tokens)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count tokens: the whole prompt at first, of which a rank sees its part."""
        if self.is_initialized:
            return super().update(key_states, value_states)
        self.is_initialized, self.tokens = True, self.places.prompt
        return key_states, value_states


class ShardedCache(Cache):
    """What the layers keep of a context spread over the ranks of a mesh: a rank holds its part of the tokens.

    The prompt stays where ring attention left it; new tokens go to the ranks in turn.
    """

    layers: Any  # of ShardedLayer and ReplicatedState

    def __init__(self, mesh: Mesh, layers: Sequence[ShardedLayer | ReplicatedState], places: Places) -> None:
        super().__init__(layers=list(layers))
        self.mesh, self.places = mesh, places
        self.beams = 1
        self.ready = False
        """The prompt is in: attention reads the cache from here on."""

    @property
    def filled(self) -> bool:
        """Every layer has its part of the prompt."""
        return all(layer.is_initialized for layer in self.layers)

    def attend(
        self, layer: int, q: torch.Tensor, *, window: int | None, sink: torch.Tensor | None, **scores: Any
    ) -> Any:
        """Attention of q (B, H, T, D), the last T tokens of the context, to all of it; (B, H, T, Dv) in q's dtype."""
        held: Any = self.layers[layer]
        of_prompt, of_new = self.places.visible(held.seen, q.shape[2], window)
        if window is not None:
            held.forget(window + q.shape[2] - 1)  # the first of these queries looks back furthest
        of_prompt = of_prompt[..., of_prompt.shape[2] - held.prompt[0].shape[2] :]
        of_new = of_new[..., of_new.shape[2] - held.keys.shape[2] :]
        first = self.mesh.sequence_rank == 0  # a sink is one more logit, once
        keys, values = held.prompt
        part = attend_part(q, keys, values, of_prompt, sink=sink if first else None, **scores)
        if held.keys.shape[2]:
            part = merge(part, attend_part(q, held.keys, held.values, of_new, **scores))
        return merge_over_ranks(part, self.mesh)[0].to(q.dtype)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follow a beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch; beams that stay with their prompt go on sharing it."""
        homes = torch.arange(len(self.places.documents), device=indices.device).repeat_interleave(self.beams)
        asked = indices // self.beams
        prompts = None if torch.equal(asked, homes) else asked
        if prompts is not None:
            self.beams = 1
            self.places.documents = self.places.documents.index_select(0, prompts)
        for layer in self.layers:
            if isinstance(layer, ShardedLayer):
                layer.select(indices, prompts)
            else:
                layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Give every row ``repeats`` beams."""
        rows = torch.arange(len(self.places.documents) * self.beams, device=self.places.documents.device)
        for layer in self.layers:
            if isinstance(layer, ShardedLayer):
                layer.select(rows.repeat_interleave(repeats), None)
            else:
                layer.batch_repeat_interleave(repeats)
        self.beams *= repeats
