"""The cache of a bounded state: documents continued from call to call, and transformers' interface."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from longctx.decode.caches.state import StateLayer, state_layer
from longctx.errors import ModelError


@dataclass
class Sum:
    """A state with a row per batch row."""

    rows: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def select(self, indices: torch.Tensor) -> Sum:
        return Sum(self.rows[indices])


def call(layer: StateLayer, positions: torch.Tensor | None, valid: torch.Tensor | None, tokens: int) -> torch.Tensor:
    layer.update(torch.empty(2, 1, tokens, 1), torch.empty(2, 1, tokens, 1))
    return layer.documents_of(positions, valid, (2, tokens))


@settings(max_examples=20)
@given(data=st.data(), cuts=st.lists(st.integers(1, 11), max_size=3), pads=st.none() | st.integers(0, 12))
def test_documents_do_not_depend_on_how_calls_are_split(data: st.DataObject, cuts: list[int], pads: int | None) -> None:
    """A document begins where a position is not the one before plus 1; padding is skipped."""
    lengths = [data.draw(st.lists(st.integers(1, 5), min_size=12, max_size=12)) for _ in range(2)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row])[:12] for row in lengths])
    numbers = torch.stack([torch.arange(12).repeat_interleave(torch.tensor(row))[:12] for row in lengths])
    valid = None
    if pads is not None:  # three tokens of padding in front of this token
        fill = torch.zeros(2, 3, dtype=torch.int64)
        positions = torch.cat((positions[:, :pads], fill, positions[:, pads:]), 1)
        valid = ((torch.arange(15) < pads) | (torch.arange(15) >= pads + 3)).expand(2, 15)
    layer, found, edges = StateLayer(), [], sorted({0, *cuts, positions.shape[1]})
    for start, stop in zip(edges, edges[1:], strict=False):
        part = None if valid is None else valid[:, start:stop]
        found.append(call(layer, positions[:, start:stop], part, stop - start))
    ids = torch.cat(found, 1)
    if valid is not None:
        assert torch.equal(ids == -1, ~valid)
        ids = ids[valid].view(2, 12)
    assert torch.equal(ids - ids[:, :1], numbers)
    assert layer.get_seq_length() == positions.shape[1]


def test_without_positions_everything_is_one_document() -> None:
    layer = StateLayer()
    assert torch.equal(call(layer, None, None, 3), torch.zeros(2, 3, dtype=torch.int64))
    assert torch.equal(call(layer, None, None, 1), torch.zeros(2, 1, dtype=torch.int64))
    assert layer.get_mask_sizes(1) == (5, 0) and layer.get_max_length() == -1


def test_rows_follow_a_beam_search() -> None:
    layer = StateLayer()
    call(layer, torch.tensor([[0, 1], [4, 5]]), None, 2)
    layer.state = Sum(torch.tensor([10.0, 20.0]))
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert layer.state.rows.tolist() == [20, 10, 10, 20]
    assert layer.position is not None and layer.position.tolist() == [5, 1, 1, 5]
    assert layer.nbytes == 4 * 4 + 2 * 4 * 8
    layer.reset()
    assert layer.nbytes == 0 and layer.get_seq_length() == 0


def test_tokens_cannot_be_removed() -> None:
    layer = StateLayer()
    layer.crop(0)
    with pytest.raises(ModelError, match="tokens cannot be removed from a bounded state"):
        layer.crop(-1)


def test_an_empty_growing_layer_is_replaced() -> None:
    cache = DynamicCache()
    layer = state_layer(cache, 1)
    assert len(cache.layers) == 2 and cache.layers[1] is layer and state_layer(cache, 1) is layer
    cache.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0)
    with pytest.raises(ModelError, match="layer 0 has a bounded state, but its cache is a DynamicLayer that is in use"):
        state_layer(cache, 0)
