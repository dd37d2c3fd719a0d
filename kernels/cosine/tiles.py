"""Chunk lengths, tiles, warps and stages of the cosine kernels: a plain function of what is computed and of the chip.

The rows are what fits: no spilled register (fp32 apart) and no more shared memory than the chip has, proven ahead of
time by tests/kernels/test_aot_others.py. None has been measured. Other chips take the same rows, unproven.
"""

from __future__ import annotations

from typing import NamedTuple

WIDTHS = (64, 128, 256)
"""What the larger head dimension is rounded up to when a row is looked up."""
KINDS = ("half", "float")
PASSES = ("output", "queries", "keys", "values", "write")
ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")


class Config(NamedTuple):
    """A program owns `chunk` tokens and takes the head dimension that is summed over in parts of `step` numbers; the
    pass `write` makes tiles of (step, step)."""

    chunk: int
    step: int
    warps: int
    stages: int = 1


def choose(name: str, width: int, itemsize: int, arch: str) -> Config:
    """The configuration of a pass; all passes of one call have the same chunk.

    Args:
        name: one of PASSES. width: the larger head dimension, up to 256. itemsize: bytes of one number of q.
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
