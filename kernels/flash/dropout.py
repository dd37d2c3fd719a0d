"""Which attention probabilities dropout keeps: a hash of (seed, head, query, key), independent of the number of ranks.

It uses 32-bit integer arithmetic, so that every backend computes the same bits: here in int64 with the upper half
masked, in a kernel in uint32. A query's part is mixed once per row; each pair costs one more mix.

    row  = mix(mix(lo32(seed) ^ mix(hi32(seed) + 0x9E3779B9 * (head + 1))) + query)
    hash = mix(row ^ (key * 0x85EBCA6B + 0xC2B2AE35))            kept iff hash >= round(p * 2^32)
"""

from __future__ import annotations

import torch

_LOW = 0xFFFFFFFF


def kept(seeds: torch.Tensor, heads: int, queries: torch.Tensor, keys: torch.Tensor, p: float) -> torch.Tensor:
    """Return which probabilities are kept, (B, H, Tq, Tk) bool.

    Args:
        seeds: (B,) int64, one per batch row.
        queries: (Tq,) and keys: (Tk,) int64, global indices.
        p: probability of dropping, 0 <= p < 1.
    """
    low, high = seeds & _LOW, (seeds >> 32) & _LOW
    head = torch.arange(1, heads + 1, device=seeds.device) * 0x9E3779B9
    stream = mix((low[:, None] ^ mix(high[:, None] + head)) & _LOW)  # (B, H)
    rows = mix(stream[:, :, None] + queries)
    return mix(rows[..., None] ^ ((keys * 0x85EBCA6B + 0xC2B2AE35) & _LOW)) >= threshold(p)


def mix(x: torch.Tensor) -> torch.Tensor:
    """Return a bijective hash of the lower 32 bits, in which each input bit affects all output bits; int64 in and
    out."""
    x = x & _LOW
    x = (x ^ (x >> 16)) * 0x7FEB352D & _LOW
    x = (x ^ (x >> 15)) * 0x846CA68B & _LOW
    return x ^ (x >> 16)


def threshold(p: float) -> int:
    """Return the smallest hash that is kept."""
    return round(p * 2**32)
