"""How many bytes a transformers cache holds, whatever its layers are."""

from __future__ import annotations

from typing import Any


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors of a cache; of an encoder-decoder's, both halves. Layers of ours say it themselves."""
    halves = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    if any(half is not None for half in halves):
        return sum(cache_bytes(half) for half in halves if half is not None)
    return sum(_bytes_of(layer) for layer in cache.layers)


def _bytes_of(layer: Any) -> int:
    own = getattr(layer, "nbytes", None)
    if own is not None:
        return int(own)
    return sum(x.untyped_storage().nbytes() for x in (layer.keys, layer.values) if x is not None)
