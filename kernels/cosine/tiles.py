"""Chunk lengths, tiles, warps and stages of the cosine kernels: a plain function of the pass and the chip.

The configurations spill no register (except fp32) and fit the chip's shared memory, as verified ahead of time by
tests/kernels/test_aot_others.py. Their speed has not been measured. Other chips use them unverified.
"""

from __future__ import annotations

from typing import NamedTuple

WIDTHS = (64, 128, 256)
"""The larger head dimension is rounded up to one of these."""
KINDS = ("half", "float")
PASSES = ("output", "queries", "keys", "values", "write")
ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")


class Config(NamedTuple):
    """A program computes `chunk` tokens and sums over the head dimension `step` elements at a time; the pass `write`
    has output tiles of (step, step)."""

    chunk: int
    step: int
    warps: int
    stages: int = 1


def choose(name: str, width: int, itemsize: int, arch: str) -> Config:
    """Return the configuration of a pass; all passes of one call have the same chunk.

    Args:
        name: one of PASSES. width: the larger head dimension, up to 256. itemsize: bytes of an element of q.
        arch: one of ARCHES, "interpreter", or another chip's name.
    """
    if arch == "interpreter":  # small and unequal, so that short tests have many chunks and a mix-up of sides shows
        return Config(16, 16, 1)
    chunk = 32 if width > 128 or itemsize > 2 else 64
    if name == "write":
        return Config(chunk, 64 if itemsize <= 2 else 32, 4)
    if itemsize > 2:
        return Config(chunk, 32 if width <= 128 else 16, 4 if width <= 128 else 8)
    return Config(chunk, 64 if width <= 64 else 32, 4 if width <= 64 else 8)
