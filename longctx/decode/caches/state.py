"""The cache of a layer whose state does not grow: one entry among the others of transformers' `Cache`.

It holds the operator's state (ABC's slots, Cottention's matrix, a window's last tokens) and where each row of the batch
stands: how many tokens it has seen, the last one's position, and the number of its document. The layer reads and
writes ``state``; transformers queries lengths, and reorders the batch for beam search.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from longctx.errors import ModelError


class StateLayer(CacheLayerMixin):
    """The state of one layer and one batch, of a size that no number of tokens changes."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.tokens = 0
        self.position: torch.Tensor | None = None
        """(B,) int64: position of each row's last token that is no padding"""
        self.document: torch.Tensor | None = None
        """(B,) int64: number of the document it belongs to"""

    @property
    def nbytes(self) -> int:
        """Bytes that the layer holds."""
        kept = sum(tensor.nbytes for tensor in (self.position, self.document) if tensor is not None)
        return kept + (self.state.nbytes if self.state is not None else 0)

    def documents_of(
        self,
        position_ids: torch.Tensor | None,
        valid: torch.Tensor | None,
        shape: tuple[int, int],
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Return the documents of the tokens that ``update`` has counted last, going on with the one before them where
        its position goes on.

        Args:
            position_ids: (B or 1, T), or None where the model does not say: then everything is one document.
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
        latest = (valid * index).cummax(1).values  # the last token up to here that is no padding, from 1; 0: carried
        before = torch.nn.functional.pad(latest[:, :-1], (1, 0))
        known = torch.cat([self.position[:, None], positions], dim=1)
        starts = valid & (positions != known.gather(1, before) + 1)
        ids = self.document[:, None] + starts.cumsum(1)
        self.position = known.gather(1, latest[:, -1:])[:, 0]
        self.document = ids[:, -1]
        return torch.where(valid, ids, -1)

    # -- what transformers asks of a layer ---------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare: an empty state is None."""
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the new tokens and give their keys and values back: the layer writes them into its state itself."""
        self.is_initialized = True
        self.tokens += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return what a growing cache would say, which is right for whichever layer the mask is made from."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Return how many tokens have been seen, padding included."""
        return self.tokens

    def get_max_length(self) -> int:
        """Return -1: there is no longest sequence."""
        return -1

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the rows that beam search has chosen."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the given rows of the batch."""
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
        """Refuse: what has been written into a bounded state cannot be taken out again."""
        if tokens_to_remove:
            raise ModelError(
                "a bounded state cannot forget its last tokens, which assisted (speculative) decoding asks for; "
                "generate without an assistant and without prompt lookup"
            )

    def reset(self) -> None:
        """Forget everything."""
        self.state = self.position = self.document = None
        self.tokens = 0
        self.is_initialized = False

    def offload(self) -> None:
        """Stay: the state is small."""

    def prefetch(self) -> None:
        """Nothing was offloaded."""


def state_layer(cache: Any, index: int) -> StateLayer:
    """Return the state of layer ``index`` of a transformers cache, put there in place of an empty growing one.

    Raises:
        ModelError: the cache is static or quantised, or holds keys of this layer already.
    """
    while len(cache.layers) <= index and getattr(cache, "layer_class_to_replicate", None) is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, StateLayer):
        return layer
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.is_initialized:
        raise ModelError(
            f"layer {index} keeps a bounded state, but its cache is a {type(layer).__name__}"
            f"{' that is in use' if layer.is_initialized else ''}; start with an empty cache that grows "
            "(cache_implementation='dynamic', the default)"
        )
    cache.layers[index] = state = StateLayer()
    return state
