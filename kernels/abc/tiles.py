"""Chunk lengths, warps and stages of ABC's kernels: a plain function of the pass and the chip.

The configurations spill no register (except fp32) and fit the chip's shared memory, as verified ahead of time by
tests/kernels/test_aot_others.py. Their speed has not been measured. Other chips use them unverified.
"""

from __future__ import annotations

from typing import NamedTuple

WIDTHS = (64, 128)
"""The largest of head dimensions and slots is rounded up to one of these."""
KINDS = ("half",)
"""What is compiled ahead of time. fp32, used to verify results, has small chunks and is not compiled."""
PASSES = ("output", "queries", "keys", "control", "mass", "write", "recall")
ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")


class Config(NamedTuple):
    """A program owns `chunk` tokens, a power of two."""

    chunk: int
    warps: int
    stages: int = 1


def choose(name: str, width: int, itemsize: int, arch: str) -> Config:
    """Return the configuration of a pass; all passes of one call have the same chunk.

    Args:
        name: one of PASSES. width: the largest of D, Dv and M, up to 128. itemsize: bytes of an element of q.
        arch: one of ARCHES, "interpreter", or another chip's name.
    """
    if arch == "interpreter":
        return Config(8, 1)
    if itemsize > 2:
        return Config(16, 4)
    if arch == "gfx942":  # its warps are of 64 threads
        return Config(32 if width <= 64 else 16, 4)
    if width <= 64:
        return Config(32, 8 if name == "queries" else 4)
    return Config(16, 8, 2 if (name, arch) == ("queries", "sm_100") else 1)
