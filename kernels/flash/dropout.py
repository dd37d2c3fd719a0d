"""Which attention probabilities dropout keeps: a hash of (seed, head, query, key), the same on any number of ranks.

Written in 32-bit integer arithmetic, so that every backend gets the same bits: here in int64 with the upper half masked
away, in a kernel in plain uint32. The part of a query row is mixed once; a pair costs one more mixing.

    row  = mix(mix(lo32(seed) ^ mix(hi32(seed) + 0x9E3779B9 * (head + 1))) + query)
    hash = mix(row ^ (key * 0x85EBCA6B + 0xC2B2AE35))            kept iff hash >= round(p * 2^32)
"""

from __future__ import annotations

import torch

_LOW = 0xFFFFFFFF


def kept(seeds: torch.Tensor, heads: int, queries: torch.Tensor, keys: torch.Tensor, p: float) -> torch.Tensor:
    """(B, H, Tq, Tk) bool: which probabilities stay.

    Args:
        seeds: (B,) int64, one per batch row.
        queries: (Tq,) and keys: (Tk,) int64, global indices.
        p: the share that is dropped, 0 <= p < 1.
    """
    low, high = seeds & _LOW, (seeds >> 32) & _LOW
    head = torch.arange(1, heads + 1, device=seeds.device) * 0x9E3779B9
    stream = mix((low[:, None] ^ mix(high[:, None] + head)) & _LOW)  # (B, H)
    rows = mix(stream[:, :, None] + queries)
    return mix(rows[..., None] ^ ((keys * 0x85EBCA6B + 0xC2B2AE35) & _LOW)) >= threshold(p)


def mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32 bits in which every bit of the input moves every bit of the output; int64 in and out."""
    x = x & _LOW
    x = (x ^ (x >> 16)) * 0x7FEB352D & _LOW
    x = (x ^ (x >> 15)) * 0x846CA68B & _LOW
    return x ^ (x >> 16)


def threshold(p: float) -> int:
    """Hashes from here on are kept."""
    return round(p * 2**32)
