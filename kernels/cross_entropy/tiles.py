"""Lanes and warps of the cross entropy kernel: a plain function of the vocabulary and the chip. Not measured."""

from __future__ import annotations

from typing import NamedTuple

WIDTHS = (512, 50_257, 128_256)
"""Vocabularies whose kernels are compiled ahead of time: rows read in one step, rows at any address, and rows of many
steps at addresses aligned to 16 elements. Other vocabularies of the last two kinds have the same kernels."""
KINDS = ("half", "float")
PASSES = ("row", "capped", "evaluation")
"""Loss and gradient; loss and gradient with a softcap; loss alone."""
ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")


class Config(NamedTuple):
    """A program reads `width` elements of its row at a time."""

    width: int
    warps: int


def choose(vocabulary: int, arch: str) -> Config:
    """Return the configuration for rows of `vocabulary` elements.

    Args:
        arch: one of ARCHES, "interpreter", or another chip's name.
    """
    if arch == "interpreter":  # small, so that short rows are read in many steps
        return Config(16, 1)
    width = 64
    while width < min(vocabulary, 4096):
        width *= 2
    return Config(width, 8 if width >= 2048 else 4)
