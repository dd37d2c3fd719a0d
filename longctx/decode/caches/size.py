"""The bytes of a transformers cache, with any kind of layers."""

from __future__ import annotations

from typing import Any


def cache_bytes(cache: Any) -> int:
    """Return the bytes of all tensors of a cache, of both halves of an encoder-decoder's; our layers have nbytes."""
    halves = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    if any(half is not None for half in halves):
        return sum(cache_bytes(half) for half in halves if half is not None)
    return sum(_bytes_of(layer) for layer in cache.layers)


def _bytes_of(layer: Any) -> int:
    own = getattr(layer, "nbytes", None)
    if own is not None:
        return int(own)
    return sum(x.untyped_storage().nbytes() for x in (layer.keys, layer.values) if x is not None)
