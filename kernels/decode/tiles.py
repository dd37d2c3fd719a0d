"""Tiles of the decode kernel and the number of splits: plain functions of the shape and the chip.

The configurations spill no register (except fp32) and fit the chip's shared memory, as verified ahead of time by
tests/kernels/test_aot_others.py. Their speed has not been measured. Other chips use sm_80's, unverified.
"""

from __future__ import annotations

from typing import NamedTuple

KINDS = ("half", "extras", "float")
"""half: bf16 and fp16, all keys visible; extras: the same with further terms or hidden keys; float: fp32 with exact
products, without tensor cores, with or without extras."""
PASSES = ("partial",)
_ALL = (64, 128, 256, 576, 1024, 2048, 4096)
WIDTHS = {"half": _ALL, "extras": _ALL, "float": (128, 1024)}
"""Head dimensions compiled ahead of time: separate keys and values up to 256, DeepSeek's latent, models' widths."""
ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")
MERGED = 512
"""Maximum number of columns per program that merges splits."""
_SHARED = {"sm_90": 224 * 1024, "sm_100": 224 * 1024}
"""Bytes of shared memory per chip; 160 KiB for others."""


class Config(NamedTuple):
    """A program computes `rows` rows and `values` chunks of `width` columns, `step` keys per tile. kept: a tile of
    keys stays in shared memory and is also the tile of values; the program then computes all columns."""

    rows: int
    step: int
    width: int
    values: int
    kept: bool
    warps: int
    stages: int


def choose(rows: int, key_width: int, value_width: int, shared: bool, itemsize: int, extras: bool, arch: str) -> Config:
    """Return the configuration of a call.

    Args:
        rows: the rows that share a key head: beams x heads of its group x new tokens.
        shared: values are the first columns of the keys.
        itemsize: bytes per element of q.
        extras: the logits have further terms, or keys are hidden.
        arch: one of ARCHES, "interpreter", or another chip's name.
    """
    if arch == "interpreter":  # small and unequal, so that short tests have many tiles of each kind
        chunks, kept = -(-value_width // 16), shared and key_width <= 48
        return Config(16, 16, 16, chunks if kept else min(chunks, 2), kept, 1, 1)
    amd = arch.startswith("gfx")
    widest = 256 if itemsize > 2 else 1024 if amd else 2048  # columns that a program can compute
    width = _chunk(key_width) if itemsize <= 2 else 32
    kept = shared and key_width <= widest
    whole = kept or key_width <= 256  # else the chunks of the keys are loaded in a loop
    chunks = -(-value_width // width)
    values = chunks if kept or chunks * width <= 256 else min(chunks, widest // 2 // width)
    columns = values * width
    # The output accumulator, tile x columns in fp32, must fit in the registers.
    fits = whole and 32 * columns <= 32768 and not amd if itemsize <= 2 else 32 * columns <= 4096
    tile = 32 if rows > 16 and fits else 16
    if itemsize > 2:
        return Config(tile, 16, width, values, kept, 8, 1)
    warps = 4 if columns <= 128 or (amd and not kept) else 8
    if amd:
        return Config(tile, 16 if kept else 32, width, values, kept, warps, 1)
    # The queries and the prefetched tiles of keys and values must fit in shared memory: the largest step that does.
    query_bytes = 2 * -(-key_width // width) * width if whole else 2 * width
    bytes_per_key = query_bytes if kept or not whole else query_bytes + 2 * columns
    budget = _SHARED.get(arch, 160 * 1024)
    for step, stages in ((64, 3), (32, 3), (16, 3), (16, 2)):
        if tile * query_bytes + (stages - 1) * step * bytes_per_key <= budget:
            break
    crowded = extras and (not kept or columns >= 1024)  # further terms need registers and shared memory too
    return Config(tile, max(16, step // 2) if crowded else step, width, values, kept, warps, stages)


def splits(units: int, keys: int, step: int, processors: int) -> int:
    """Return the number of splits of a context of `keys`: units x splits programs fill the processors once, and each
    has at least four tiles, because each split writes a partial result that the merge reads again.

    Args:
        units: programs per split: batch x key heads x tiles of rows and columns.
    """
    return max(1, min(processors // max(units, 1), keys // (4 * step), 256))


def _chunk(width: int) -> int:
    """Return the columns per chunk: 128, or 64 if that pads less."""
    wasted = -width % 128
    return 64 if width <= 64 or 10 * wasted > width else 128
