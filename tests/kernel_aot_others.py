"""Compile all kernels but flash's for chips that are not here; as kernel_aot.py for flash.

Run as a process of its own, without TRITON_INTERPRET: `python tests/kernel_aot_others.py CASE...` prints one JSON
object a case; `--record [OPERATOR...]` writes kernels/<operator>/compiled.json. A case is
operator-arch-kind-pass-width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import kernel_aot as aot
import kernel_aot_decode as decode

KERNELS = aot.FLASH.parent
SHARED_SOURCES = ("flash/elements", "cosine/numbers", "cosine/states")
SOURCES = {"cosine": (*SHARED_SOURCES, "cosine/lengths", "cosine/product")}
SOURCES["abc"] = (*SHARED_SOURCES, "abc/pairs", "abc/masses", "abc/states", "abc/rows", "abc/columns")
SOURCES["decode"] = ("flash/elements", "decode/partial", "decode/merge")
SOURCES["cross_entropy"] = ("flash/elements", "cross_entropy/row")
PLAIN = {"cosine": ("lengths", "scan"), "abc": ("masses", "walk"), "decode": ("merge",), "cross_entropy": ()}
"""Passes without products, compiled once a chip."""
NO_PRODUCTS = ("cross_entropy",)


class Case(NamedTuple):
    """One pass of one operator at one width on one chip."""

    operator: str
    arch: str
    kind: str
    name: str
    width: int

    def __str__(self) -> str:
        return "-".join(map(str, self))

    @property
    def config(self) -> tuple[Any, ...]:
        if self.name in PLAIN[self.operator]:
            return ()
        if self.operator == "decode":
            return decode.config(self)
        if self.operator == "cross_entropy":
            return tuple(tiles_of(self.operator).choose(self.width, self.arch))
        itemsize = 4 if self.kind == "float" else 2
        return tuple(tiles_of(self.operator).choose(self.name, self.width, itemsize, self.arch))

    @property
    def hash(self) -> str:
        """Of the kernels' sources and the configuration: what a record stands for."""
        text = "".join((KERNELS / f"{name}.py").read_text() for name in SOURCES[self.operator])
        return hashlib.sha256(f"{text}{self}{self.config}".encode()).hexdigest()[:16]


def tiles_of(operator: str) -> Any:
    import importlib

    return importlib.import_module(f"longctx.kernels.{operator}.tiles")


def record(operator: str) -> Path:
    return KERNELS / operator / "compiled.json"


def cases(operator: str) -> Iterator[Case]:
    """Every row of every chip."""
    tiles = tiles_of(operator)
    for arch in tiles.ARCHES:
        for kind in tiles.KINDS:
            for width in tiles.WIDTHS[kind] if operator == "decode" else tiles.WIDTHS:
                yield from (Case(operator, arch, kind, name, width) for name in tiles.PASSES)
        yield from (Case(operator, arch, "half", name, 128) for name in PLAIN[operator])


def parse(text: str) -> Case:
    operator, arch, kind, name, width = text.split("-")
    return Case(operator, arch, kind, name, int(width))


def empty(*shape: int, dtype: Any = None) -> Any:
    """On torch's meta device: nothing is allocated."""
    import torch

    return torch.empty(shape, dtype=dtype or torch.float32, device="meta")


def cosine(case: Case) -> Any:
    """The launch of a pass over packed documents with grouped heads."""
    import torch

    from longctx.kernels.cosine.fused import Causal, Documents, Side

    length, dtype = 4096, torch.float32 if case.kind == "float" else torch.bfloat16
    q, k, v, dout = (empty(2, heads, length, case.width, dtype=dtype) for heads in (32, 8, 8, 32))
    call = Causal(q, k, v, empty(2, 8, length), False, None, case.arch)
    ids = empty(2, length, dtype=torch.int64)
    edges = empty(2, call.chunks + 1, dtype=torch.int64)
    call = Causal(q, k, v, empty(2, 8, length), False, Documents(ids, edges, empty(2, call.chunks)), case.arch)
    queries, keys = (Side(x, empty(*x.shape[:3]), empty(*x.shape[:3])) for x in (q, k))
    states = call.states()
    made: dict[str, Callable[[], Any]] = {
        "lengths": lambda: call.lengths(queries=False)[0],
        "scan": lambda: call.scan(states, states[:, :, 0].contiguous(), down=True),
        "write": lambda: call.write(queries, dout, states, after=False),
        "output": lambda: call.output(queries, keys, states, dout),
        "queries": lambda: call.queries(queries, keys, dout, states, q, None),
        "keys": lambda: call.keys(queries, keys, dout, states, k, empty(2, 8, length)),
        "values": lambda: call.values(queries, keys, dout, states, v),
    }
    return made[case.name]()


def abc(case: Case) -> Any:
    """The launch of a pass over packed documents with grouped heads; as many slots as numbers a head."""
    import torch

    from longctx.kernels.abc.fused import Causal, Documents, Masses

    length, dtype = 4096, torch.float32 if case.kind == "float" else torch.bfloat16
    q, k, v, s, dout = (empty(2, heads, length, case.width, dtype=dtype) for heads in (32, 8, 8, 8, 32))
    chunks = Causal(q, k, v, s, 0.1, None, case.arch).chunks
    ids, edges = (empty(2, n, dtype=torch.int64) for n in (length, chunks + 1))
    call = Causal(q, k, v, s, 0.1, Documents(ids, edges, empty(2, chunks)), case.arch)
    masses = Masses(empty(2, 8, length, case.width), empty(2, 8, chunks + 1, case.width))
    memory, y = empty(2, 8, chunks + 1, case.width, case.width), empty(2, 32, length, case.width)
    made: dict[str, Callable[[], Any]] = {
        "masses": lambda: call.masses(empty(2, 8, case.width))[0][2],
        "walk": lambda: call.masses(empty(2, 8, case.width))[0][1],
        "write": lambda: call.write(k, masses)[0],
        "recall": lambda: call.write(q, masses, y)[0],
        "output": lambda: call.output(masses, memory, memory, dout),
        "queries": lambda: call.queries(masses, memory, memory, dout, q)[0],
        "keys": lambda: call.keys(k, q, y, masses, memory, k),
        "control": lambda: call.control(k, q, y, masses, memory, masses.z, first=False),
        "mass": lambda: call.mass(y, masses, memory[..., :1].contiguous(), masses.z),
    }
    return made[case.name]()


def cross_entropy(case: Case) -> Any:
    """The launch over a tile of 1,024 tokens of a vocabulary of so many."""
    import torch

    from longctx.kernels.cross_entropy.fused import launch

    dtype = torch.float32 if case.kind == "float" else torch.bfloat16
    logits, labels = empty(1024, case.width, dtype=dtype), empty(1024, dtype=torch.int64)
    softcap, gradient = 30.0 if case.name == "capped" else None, case.name != "evaluation"
    return launch(
        logits, labels, empty(1024), softcap=softcap, z_loss=1e-4, ignore_index=-100, gradient=gradient, arch=case.arch
    )


LAUNCHES = {"abc": abc, "cosine": cosine, "cross_entropy": cross_entropy, "decode": decode.launch}


def compile_case(case: Case) -> aot.Compiled:
    import triton

    registers, spilled, shared, text = aot.build(LAUNCHES[case.operator](case), case.arch)
    products = sum(text.count(instruction) for instruction in set(aot.PRODUCTS.values()))
    return aot.Compiled(str(case), case.hash, registers, spilled, shared, products, triton.__version__)


def problems(compiled: aot.Compiled) -> list[str]:
    """What a configuration must not be."""
    case, found = parse(compiled.case), []
    allowed = 0 if compiled.triton.startswith(aot.NEWEST) else aot.OLDER_MAY_SPILL
    if compiled.spilled > allowed and case.kind != "float":
        found.append(f"{compiled.case}: {compiled.spilled} bytes of registers spilled")
    if compiled.shared > aot.SHARED_LIMIT[case.arch]:
        limit = aot.SHARED_LIMIT[case.arch]
        found.append(f"{compiled.case}: {compiled.shared} bytes of shared memory, the chip has {limit}")
    plain = case.name in PLAIN[case.operator] or case.operator in NO_PRODUCTS
    if case.kind != "float" and not plain and not compiled.products:
        found.append(f"{compiled.case}: no tensor-core product in the machine code")
    return found


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--record"]:
        for operator in arguments[1:] or SOURCES:
            made = [json.dumps(asdict(compile_case(case))) for case in cases(operator)]
            record(operator).write_text("[\n" + ",\n".join(made) + "\n]\n")
        return
    aot.answer(arguments, lambda text: compile_case(parse(text)))


if __name__ == "__main__":
    aot.run(main)
