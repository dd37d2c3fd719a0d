"""The cache of a layer with a bounded state: one layer of transformers' `Cache`.

It contains the operator's state (ABC's slots, Cottention's matrix, a window's last tokens), the number of tokens seen,
and each row's last position and document number. The model's layer reads and writes ``state``; transformers queries
lengths, and reorders the batch for beam search.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from longctx.errors import ModelError


class StateLayer(CacheLayerMixin):
    """The state of one layer for one batch; its size does not depend on the number of tokens."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.tokens = 0
        self.position: torch.Tensor | None = None
        """(B,) int64: position of each row's last token that is not padding."""
        self.document: torch.Tensor | None = None
        """(B,) int64: number of that token's document."""

    @property
    def nbytes(self) -> int:
        """Bytes cached."""
        kept = sum(tensor.nbytes for tensor in (self.position, self.document) if tensor is not None)
        return kept + (self.state.nbytes if self.state is not None else 0)

    def documents_of(
        self,
        position_ids: torch.Tensor | None,
        valid: torch.Tensor | None,
        shape: tuple[int, int],
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Return the documents of the tokens that ``update`` has counted last.

        A token whose position is not the previous position + 1 begins a new document.

        Args:
            position_ids: (B or 1, T); None, if the model does not pass them: then everything is one document.
            valid: (B, T) bool, False at padding; None without padding.
            shape: (B, T).

        Returns:
            (B, T) int64, -1 at padding.
        """
        if position_ids is None:
            position_ids = torch.arange(self.tokens - shape[1], self.tokens, device=device)[None]
        positions = position_ids.expand(shape)
        if valid is None:
            valid = torch.ones_like(positions, dtype=torch.bool)
        if self.position is None or self.document is None:
            self.position = positions[:, 0] - 1
            self.document = torch.zeros_like(self.position)
        index = torch.arange(1, shape[1] + 1, device=valid.device)
        # latest: the last token up to here that is not padding, counted from 1; 0 is the token before this call.
        latest = (valid * index).cummax(1).values
        before = torch.nn.functional.pad(latest[:, :-1], (1, 0))
        known = torch.cat([self.position[:, None], positions], dim=1)
        starts = valid & (positions != known.gather(1, before) + 1)
        ids = self.document[:, None] + starts.cumsum(1)
        self.position = known.gather(1, latest[:, -1:])[:, 0]
        self.document = ids[:, -1]
        return torch.where(valid, ids, -1)

    # -- transformers' interface -------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Set is_initialized: an empty state is None."""
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the new tokens and return their keys and values, which the model's layer writes into the state."""
        self.is_initialized = True
        self.tokens += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return a growing cache's (keys, offset), because one layer's sizes decide the mask of all layers."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, padding included."""
        return self.tokens

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows as a beam search selects them."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows of the batch."""
        if self.state is not None:
            self.state = self.state.select(indices)
        if self.position is not None and self.document is not None:
            self.position = self.position[indices.to(self.position.device)]
            self.document = self.document[indices.to(self.document.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self.position is not None:
            rows = torch.arange(len(self.position), device=self.position.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ModelError, unless nothing is to be removed: tokens cannot be removed from a bounded state."""
        if tokens_to_remove:
            raise ModelError(
                "tokens cannot be removed from a bounded state, which assisted (speculative) decoding requires; "
                "generate without an assistant and without prompt lookup"
            )

    def reset(self) -> None:
        """Empty the cache."""
        self.state = self.position = self.document = None
        self.tokens = 0
        self.is_initialized = False

    def offload(self) -> None:
        """Do nothing: the state is small."""

    def prefetch(self) -> None:
        """Do nothing: the state is never offloaded."""


def state_layer(cache: Any, index: int) -> StateLayer:
    """Return layer ``index`` of a transformers cache, after replacing an empty growing layer by a `StateLayer`.

    Raises:
        ModelError: the layer is static or quantised, or already contains keys.
    """
    while len(cache.layers) <= index and getattr(cache, "layer_class_to_replicate", None) is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, StateLayer):
        return layer
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.is_initialized:
        raise ModelError(
            f"layer {index} has a bounded state, but its cache is a {type(layer).__name__}"
            f"{' that is in use' if layer.is_initialized else ''}; start with an empty cache that grows "
            "(cache_implementation='dynamic', the default)"
        )
    cache.layers[index] = state = StateLayer()
    return state
