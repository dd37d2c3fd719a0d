"""A cache with transformers' interface for a context that is sharded over the ranks of a mesh.

A layer caches keys and values, or layer inputs (EL), of this rank's tokens; or a bounded state of the whole context,
whose size does not depend on the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from longctx.attention.merge import merge
from longctx.decode.caches.state import StateLayer
from longctx.decode.sharded import ContextShard, attend_part, merge_over_ranks
from longctx.errors import ModelError
from longctx.mesh import Mesh


class ShardedLayer(CacheLayerMixin):
    """One layer's keys and values of this rank's tokens; its length is that of the whole context.

    The prompt's keep the order of prefill and are stored once for all beams of a row; new tokens have one row per beam.
    """

    is_sliding = False
    is_croppable = True
    keys: Any
    values: Any
    prompt: tuple[torch.Tensor, torch.Tensor]
    """(B, G, S, D) and (B, G, S, Dv); keys and values contain only new tokens, (B * beams, G, n, D)."""

    def __init__(self, context: ContextShard) -> None:
        super().__init__()
        self.context, self.seen = context, 0
        self.freed_to = -1
        """The last position behind the sliding window: keys up to it have been freed. -1: none."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Store this rank's keys and values of the prompt."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.prompt, self.seen = (key_states, value_states), self.context.prompt_length
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append (B, G, T, D): first this rank's shard of the prompt, then new tokens, of which it keeps its own."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        mine = self.context.owned(self.seen, self.seen + key_states.shape[2])
        self.seen += key_states.shape[2]
        if mine:
            index = torch.tensor(mine, device=self.device)
            self.keys = torch.cat((self.keys, key_states.index_select(2, index)), 2)
            self.values = torch.cat((self.values, value_states.index_select(2, index)), 2)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the number of tokens of the whole context so far."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (keys, offset) of the whole context including the new tokens."""
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` of the tokens after the prompt."""
        kept = self.seen + tokens_to_remove
        new = self.seen - self.context.prompt_length
        if -tokens_to_remove > new:
            raise ModelError(
                f"crop({tokens_to_remove}) of a sharded cache: only the {new} tokens after the prompt can be removed"
            )
        if self.freed_to >= 0:
            raise ModelError(
                f"crop({tokens_to_remove}) of a sharded cache whose sliding window has passed its first tokens: keys "
                "that would be visible again have been freed; generate again from the prompt"
            )
        surplus = len(self.context.owned(kept, self.seen))
        self.keys, self.values = (x[:, :, : x.shape[2] - surplus] for x in (self.keys, self.values))
        self.seen = kept

    def free(self, window: int) -> None:
        """Free the keys that neither the newest token nor any later one sees within ``window``."""
        passed = self.seen - 1 - window
        if passed <= self.freed_to:
            return
        keys, values = self.prompt
        if keys.shape[2]:
            freed = int((self.context.positions <= passed).long().cumprod(0).sum())  # positions ascend on a rank
            left = len(self.context.positions) - freed
            if left < keys.shape[2]:
                self.prompt = keys[:, :, keys.shape[2] - left :].clone(), values[:, :, keys.shape[2] - left :].clone()
        left = len(self.context.owned(max(passed + 1, self.context.prompt_length), self.seen))
        if left < self.keys.shape[2]:
            self.keys, self.values = (x[:, :, x.shape[2] - left :].clone() for x in (self.keys, self.values))
        self.freed_to = passed

    def select(self, rows: torch.Tensor, prompts: torch.Tensor | None) -> None:
        """Select rows of the new tokens, in this order, and rows of the prompt (None: leave the prompt unchanged)."""
        self.keys, self.values = (x.index_select(0, rows) for x in (self.keys, self.values))
        if prompts is not None:
            keys, values = self.prompt
            self.prompt = keys.index_select(0, prompts), values.index_select(0, prompts)

    @property
    def nbytes(self) -> int:
        """Bytes cached on this rank."""
        held = (*self.prompt, self.keys, self.values) if self.is_initialized else ()
        return sum(x.untyped_storage().nbytes() for x in held if x.numel())


class ShardedHidden(ShardedLayer):
    """One layer's inputs for EL-attention: (rows, 1, S, C) stored as keys, with values of width 0."""


class ReplicatedState(StateLayer):
    """A bounded state of the whole context, equal on all ranks, which all update identically after the prompt."""

    def __init__(self, context: ContextShard, tokens: torch.Tensor) -> None:
        """Expect a prompt with ``tokens`` (B,) int64 tokens per row, not counting padding."""
        super().__init__()
        self.context = context
        self.position, self.document = tokens - 1, torch.zeros_like(tokens)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count tokens: first the whole prompt, of which key_states are only this rank's shard."""
        if self.is_initialized:
            return super().update(key_states, value_states)
        self.is_initialized, self.tokens = True, self.context.prompt_length
        return key_states, value_states


class ShardedCache(Cache):
    """The cache of all layers for a context that is sharded over the ranks of a mesh.

    The prompt stays where ring attention computed it; new tokens are assigned to the ranks in turn.
    """

    layers: Any  # of ShardedLayer and ReplicatedState

    def __init__(self, mesh: Mesh, layers: Sequence[ShardedLayer | ReplicatedState], context: ContextShard) -> None:
        super().__init__(layers=list(layers))
        self.mesh, self.context = mesh, context
        self.beams = 1
        self.ready = False
        """The prompt has been cached: attention reads the cache from now on."""

    @property
    def filled(self) -> bool:
        """Whether every layer has cached its shard of the prompt."""
        return all(layer.is_initialized for layer in self.layers)

    def attend(
        self, layer: int, q: torch.Tensor, *, window: int | None, sink: torch.Tensor | None, **scores: Any
    ) -> Any:
        """Attend q (B, H, T, D), the last T tokens of the context, to all of it; return (B, H, T, Dv) in q's dtype."""
        held: Any = self.layers[layer]
        of_prompt, of_new = self.context.visible(held.seen, q.shape[2], window)
        if window is not None:
            held.free(window + q.shape[2] - 1)  # the first of these queries sees the oldest key
        # Freed keys were the oldest: the masks of those that are left are the last columns.
        of_prompt = of_prompt[..., of_prompt.shape[2] - held.prompt[0].shape[2] :]
        of_new = of_new[..., of_new.shape[2] - held.keys.shape[2] :]
        first = self.mesh.sequence_rank == 0  # the sink counts once
        keys, values = held.prompt
        part = attend_part(q, keys, values, of_prompt, sink=sink if first else None, **scores)
        if held.keys.shape[2]:
            part = merge(part, attend_part(q, held.keys, held.values, of_new, **scores))
        return merge_over_ranks(part, self.mesh)[0].to(q.dtype)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows as a beam search selects them."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows of the batch; the prompt stays shared if every row keeps its prompt, and is copied otherwise."""
        prompt_of_row = torch.arange(len(self.context.documents), device=indices.device).repeat_interleave(self.beams)
        selected = indices // self.beams
        prompts = None if torch.equal(selected, prompt_of_row) else selected
        if prompts is not None:
            self.beams = 1
            self.context.documents = self.context.documents.index_select(0, prompts)
        for layer in self.layers:
            if isinstance(layer, ShardedLayer):
                layer.select(indices, prompts)
            else:
                layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, as beams that share its prompt."""
        rows = torch.arange(len(self.context.documents) * self.beams, device=self.context.documents.device)
        for layer in self.layers:
            if isinstance(layer, ShardedLayer):
                layer.select(rows.repeat_interleave(repeats), None)
            else:
                layer.batch_repeat_interleave(repeats)
        self.beams *= repeats
