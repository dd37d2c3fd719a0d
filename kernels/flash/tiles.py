"""Tile shapes, warps and stages: a plain function of the pass and the chip. There is no autotuning at run time: it
makes a job's first step slow and its speed vary, and the interpreter does not support it.

`python -m benchmarks.gpu.tune` measures candidates on a GPU and prints rows for these tables. The present rows are not
measured: they spill no register (except fp32) and fit the chip's shared memory, as tests/kernels/test_aot.py verifies
ahead of time for every row (at most 32 per chip). Other chips use small tiles, unverified.

sm_90 has a second table for kernels that read through its copy engine; see `choose_hopper`.
"""

from __future__ import annotations

from typing import NamedTuple

WIDTHS = {"half": (64, 128, 256), "extras": (128, 256), "float": (256,)}
"""The kinds of arithmetic, and the head dimensions to which each one's rows apply (rounded up). "half": bf16 and fp16
without extras; "extras": the same with softcap, ALiBi or dropout, whose index arithmetic needs registers; "float": fp32
with exact products, not on tensor cores, with or without extras."""
PASSES = ("forward", "queries", "keys")
ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")


class Config(NamedTuple):
    """A program computes `tile` rows and loops over the other side in steps of `step`. described: whole tiles of the
    other side are read through tensor descriptors, by Hopper's copy engine (TMA)."""

    tile: int
    step: int
    warps: int
    stages: int
    described: bool = False


# (kind, pass): one configuration per width of the kind.
_Rows = dict[tuple[str, str], tuple[Config, ...]]
_TABLES: dict[str, _Rows] = {
    "sm_80": {
        ("half", "forward"): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 32, 8, 2)),
        ("half", "queries"): (Config(64, 64, 8, 3), Config(64, 64, 8, 2), Config(64, 32, 8, 1)),
        ("half", "keys"): (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
        ("extras", "forward"): (Config(64, 32, 8, 2), Config(64, 16, 8, 2)),
        ("extras", "queries"): (Config(64, 32, 8, 2), Config(32, 32, 8, 1)),
        ("extras", "keys"): (Config(32, 32, 8, 2), Config(32, 32, 8, 2)),
        ("float", "forward"): (Config(16, 16, 8, 1),),
        ("float", "queries"): (Config(16, 16, 8, 1),),
        ("float", "keys"): (Config(32, 16, 8, 1),),
    },
    "sm_90": {
        ("half", "forward"): (Config(128, 128, 8, 3), Config(128, 128, 8, 2), Config(128, 32, 8, 2)),
        ("half", "queries"): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 16, 8, 2)),
        ("half", "keys"): (Config(128, 64, 8, 3), Config(128, 32, 8, 3), Config(32, 64, 8, 2)),
        ("extras", "forward"): (Config(128, 32, 8, 2), Config(64, 32, 8, 2)),
        ("extras", "queries"): (Config(64, 32, 8, 2), Config(32, 32, 8, 1)),
        ("extras", "keys"): (Config(32, 32, 8, 2), Config(32, 32, 8, 2)),
        ("float", "forward"): (Config(16, 16, 8, 1),),
        ("float", "queries"): (Config(32, 16, 8, 1),),
        ("float", "keys"): (Config(32, 16, 8, 1),),
    },
    "sm_100": {
        ("half", "forward"): (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
        ("half", "queries"): (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 16, 8, 1)),
        ("half", "keys"): (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 64, 8, 2)),
        ("extras", "forward"): (Config(64, 32, 8, 2), Config(64, 16, 8, 2)),
        ("extras", "queries"): (Config(64, 32, 8, 2), Config(32, 32, 8, 1)),
        ("extras", "keys"): (Config(32, 32, 8, 1), Config(32, 32, 8, 2)),
        ("float", "forward"): (Config(16, 16, 8, 1),),
        ("float", "queries"): (Config(32, 16, 8, 1),),
        ("float", "keys"): (Config(32, 16, 8, 1),),
    },
    "gfx942": {
        ("half", "forward"): (Config(128, 64, 4, 2), Config(128, 64, 4, 2), Config(64, 32, 4, 1)),
        ("half", "queries"): (Config(64, 64, 4, 1), Config(64, 64, 4, 1), Config(64, 16, 8, 1)),
        ("half", "keys"): (Config(64, 64, 4, 1), Config(64, 32, 4, 1), Config(64, 16, 8, 1)),
        ("extras", "forward"): (Config(64, 32, 4, 1), Config(64, 16, 4, 1)),
        ("extras", "queries"): (Config(64, 32, 4, 1), Config(64, 16, 8, 1)),
        ("extras", "keys"): (Config(64, 16, 8, 1), Config(32, 16, 4, 1)),
        ("float", "forward"): (Config(32, 16, 4, 1),),
        ("float", "queries"): (Config(32, 16, 4, 1),),
        ("float", "keys"): (Config(32, 16, 4, 1),),
    },
}

# Read through tensor descriptors. dK/dV at head dimension 256 would spill: it keeps the portable row.
_HOPPER: _Rows = {
    ("half", "forward"): (Config(128, 128, 8, 3, True), Config(128, 128, 8, 2, True), Config(128, 32, 8, 3, True)),
    ("half", "queries"): (Config(128, 64, 8, 3, True), Config(128, 64, 8, 3, True), Config(64, 16, 8, 3, True)),
    ("half", "keys"): (Config(128, 64, 8, 4, True), Config(128, 32, 8, 4, True), Config(32, 64, 8, 2)),
}

# Chips with about 100 KB of shared memory (sm_86, sm_89, sm_120), and any that is not listed.
_SMALL = {"half": Config(64, 32, 4, 2), "extras": Config(64, 32, 4, 1), "float": Config(32, 16, 4, 1)}
_SMALL_WIDE = {"half": Config(32, 32, 4, 1), "extras": Config(32, 32, 4, 1), "float": Config(16, 16, 4, 1)}
# Triton's interpreter: small and unequal, so that short tests have many tiles and swapped sides fail.
_INTERPRETER = {"forward": Config(32, 16, 1, 1), "queries": Config(16, 32, 1, 1), "keys": Config(32, 16, 1, 1)}


def kind(itemsize: int, extras: bool) -> str:
    """Return the kind of arithmetic, a key of WIDTHS."""
    if itemsize > 2:
        return "float"
    return "extras" if extras else "half"


def choose(name: str, width: int, itemsize: int, extras: bool, arch: str) -> Config:
    """Return the configuration of a pass.

    Args:
        name: one of PASSES.
        width: the larger head dimension, up to 256.
        itemsize: bytes of an element of q.
        extras: softcap, ALiBi or dropout are in use.
        arch: one of ARCHES, "interpreter", or another chip's name.
    """
    if arch == "interpreter":
        return _INTERPRETER[name]
    if arch not in _TABLES:
        return (_SMALL if width <= 128 else _SMALL_WIDE)[kind(itemsize, extras)]
    chosen = kind(itemsize, extras)
    column = next(i for i, limit in enumerate(WIDTHS[chosen]) if width <= limit)
    return _TABLES[arch][chosen, name][column]


def choose_hopper(name: str, width: int, itemsize: int, extras: bool, arch: str) -> Config:
    """Return `choose`'s configuration for sm_90's path, which reads through tensor descriptors in half precision
    without extras; the portable one for other calls."""
    chosen = kind(itemsize, extras)
    if arch == "interpreter":
        return _INTERPRETER[name]._replace(described=True)
    if arch != "sm_90" or chosen != "half":
        return choose(name, width, itemsize, extras, arch)
    column = next(i for i, limit in enumerate(WIDTHS[chosen]) if width <= limit)
    return _HOPPER[chosen, name][column]
