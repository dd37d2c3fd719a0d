"""Bytes of caches of any kind."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from longctx.decode.caches.prompt import PromptLayer, use_layers
from longctx.decode.caches.size import cache_bytes


def test_all_layers_and_both_halves() -> None:
    own, cross, empty = DynamicCache(), DynamicCache(), DynamicCache()
    for layer in range(2):
        own.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5), layer)
    cross.update(torch.ones(1, 2, 7, 4, dtype=torch.float16), torch.ones(1, 2, 7, 4, dtype=torch.float16), 0)
    assert cache_bytes(own) == 2 * 2 * 3 * (4 + 5) * 4
    assert cache_bytes(EncoderDecoderCache(own, cross)) == cache_bytes(own) + 2 * 7 * (4 + 4) * 2
    assert cache_bytes(empty) == 0


def test_our_layers_count_what_they_share_once() -> None:
    cache = DynamicCache()
    use_layers(cache, [0], PromptLayer, 4)
    cache.update(torch.ones(8, 1, 5, 2), torch.ones(8, 1, 5, 2), 0)
    assert cache_bytes(cache) == 2 * 5 * 2 * 2 * 4


def test_a_view_counts_its_whole_storage() -> None:
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 8, 2), torch.ones(1, 1, 8, 2), 0)
    cache.crop(-6)
    assert cache.get_seq_length() == 2 and cache_bytes(cache) == 2 * 8 * 2 * 4
