"""Layer inputs in caches with transformers' interface."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer, StaticLayer

from longctx.decode.caches.hidden import HiddenLayer, append_hidden
from longctx.decode.caches.prompt import use_layers
from longctx.errors import ModelError


def test_a_growing_cache_returns_all_inputs() -> None:
    cache, x = DynamicCache(), torch.randn(2, 5, 3)
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        past, parts = append_hidden(cache, x[:, start:stop], 0)
        assert past == start and torch.equal(torch.cat(parts, 1), x[:, :stop])
    assert cache.layers[0].values.numel() == 0


def test_a_prompt_is_stored_once_for_its_beams() -> None:
    cache, prompt, new = DynamicCache(), torch.randn(2, 4, 3), torch.randn(6, 1, 3)
    use_layers(cache, [0], HiddenLayer, 3)
    past, parts = append_hidden(cache, prompt.repeat_interleave(3, 0), 0)
    assert past == 0 and [x.shape for x in parts] == [(2, 4, 3)] and torch.equal(parts[0], prompt)
    past, parts = append_hidden(cache, new, 0)
    assert past == 4 and torch.equal(parts[0], prompt) and torch.equal(parts[1], new)
    assert cache.layers[0].nbytes == (prompt.numel() + new.numel()) * 4  # no values


def test_a_static_cache_returns_only_what_has_been_written() -> None:
    cache, x = Cache(layers=[StaticLayer(max_cache_len=8)]), torch.randn(1, 3, 4)
    append_hidden(cache, x[:, :2], 0)
    past, parts = append_hidden(cache, x[:, 2:], 0)
    assert past == 2 and torch.equal(parts[0], x)


def test_a_sliding_cache_is_refused() -> None:
    cache = Cache(layers=[DynamicSlidingWindowLayer(sliding_window=2)])
    with pytest.raises(ModelError, match="DynamicSlidingWindowLayer cannot hold hidden states"):
        append_hidden(cache, torch.ones(1, 3, 4), 0)
