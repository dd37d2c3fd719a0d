"""Tile shapes, warps and stages: a plain function of what is computed and of the chip. No autotuning at run time, which
the interpreter cannot do and which makes the first step of a job slow and its speed a matter of luck.

`python -m benchmarks.gpu.tune` measures candidates on a GPU and prints rows for these tables. Until it has, the rows
are what fits: no spilled register (fp32 apart) and no more shared memory than the chip has, proven ahead of time by
tests/kernels/test_aot.py. At most 32 rows a chip, so that all of them can be. Other chips take small tiles, unproven.

sm_90 has a second table, of kernels that read through its copy engine; see `choose_hopper`.
"""

from __future__ import annotations

from typing import NamedTuple

WIDTHS = {"half": (64, 128, 256), "extras": (128, 256), "float": (256,)}
"""The kinds of arithmetic, and what a head dimension is rounded up to when a row is looked up. "half": bf16 and fp16
without extras; "extras": the same with softcap, ALiBi or dropout, whose index arithmetic needs registers; "float":
fp32, exact products on no tensor core, extras or not."""
PASSES = ("forward", "queries", "keys")
ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")


class Config(NamedTuple):
    """A program owns `tile` rows and walks the other side in steps of `step`. described: whole tiles of the other side
    come through tensor descriptors, which Hopper's copy engine (TMA) serves."""

    tile: int
    step: int
    warps: int
    stages: int
    described: bool = False


# (kind, pass): one row a width of the kind.
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

# Read through tensor descriptors. Dk/dV of rows of 256 numbers spill this way: there the portable row stays.
_HOPPER: _Rows = {
    ("half", "forward"): (Config(128, 128, 8, 3, True), Config(128, 128, 8, 2, True), Config(128, 32, 8, 3, True)),
    ("half", "queries"): (Config(128, 64, 8, 3, True), Config(128, 64, 8, 3, True), Config(64, 16, 8, 3, True)),
    ("half", "keys"): (Config(128, 64, 8, 4, True), Config(128, 32, 8, 4, True), Config(32, 64, 8, 2)),
}

# Chips with about 100 KB of shared memory (sm_86, sm_89, sm_120), and any that is not listed.
_SMALL = {"half": Config(64, 32, 4, 2), "extras": Config(64, 32, 4, 1), "float": Config(32, 16, 4, 1)}
_SMALL_WIDE = {"half": Config(32, 32, 4, 1), "extras": Config(32, 32, 4, 1), "float": Config(16, 16, 4, 1)}
# Triton's interpreter: small and unequal, so that short tests have many tiles and a mix-up of the sides shows.
_INTERPRETER = {"forward": Config(32, 16, 1, 1), "queries": Config(16, 32, 1, 1), "keys": Config(32, 16, 1, 1)}


def kind(itemsize: int, extras: bool) -> str:
    """The kind of arithmetic a row of the tables is for."""
    if itemsize > 2:
        return "float"
    return "extras" if extras else "half"


def choose(name: str, width: int, itemsize: int, extras: bool, arch: str) -> Config:
    """The configuration of a pass.

    Args:
        name: one of PASSES.
        width: the larger head dimension, up to 256.
        itemsize: bytes of one number of q.
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
    """`choose` for the path of sm_90, which reads through tensor descriptors: half precision without extras. The
    portable row where there is no such path."""
    chosen = kind(itemsize, extras)
    if arch == "interpreter":
        return _INTERPRETER[name]._replace(described=True)
    if arch != "sm_90" or chosen != "half":
        return choose(name, width, itemsize, extras, arch)
    column = next(i for i, limit in enumerate(WIDTHS[chosen]) if width <= limit)
    return _HOPPER[chosen, name][column]
