"""Bring every kernel through triton's front end with the integers that a caller may give: 1, and strides of 64 bits.

Triton makes an integer argument that is 1 a Python constant, and one beyond 2^31 an i64; its interpreter does neither.
Run as a process of its own, without TRITON_INTERPRET: `python tests/kernel_specialise.py ones|each [PART...]` prints
the number of variants and one line a variant that does not compile. PART: only launches whose name contains one.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import kernel_aot as aot
import kernel_aot_others as others

ARCH = "sm_90"
BEYOND = 2**31 + 16
STRIDES = ("stride", "range_batch")
PASSES = {
    "cosine": ("lengths", "scan", "write", "output", "queries", "keys", "values"),
    "abc": ("masses", "walk", "write", "recall", "output", "queries", "keys", "control", "mass"),
    "cross_entropy": ("row", "capped", "evaluation"),
    "decode": ("partial", "merge"),
}


def launches() -> Iterator[tuple[str, Any]]:
    """(name, launch) of every pass of every operator, on the shapes of the ahead-of-time record."""
    for kind in ("half", "extras", "tma", "float"):
        for name in ("forward", "queries", "keys"):
            width = 256 if kind == "float" else 128
            yield f"flash-{kind}-{name}", aot.launch(aot.Case(ARCH, kind, name, width))
    for operator, names in PASSES.items():
        for name in names:
            case = others.Case(operator, ARCH, "half", name, 128)
            yield f"{operator}-{name}", others.LAUNCHES[operator](case)
    yield "decode-extras-partial", others.LAUNCHES["decode"](others.Case("decode", ARCH, "extras", "partial", 128))


def variants(name: str, launch: Any, each: bool) -> Iterator[tuple[str, Any]]:
    """The launch with all its integers 1, and, if `each`, with one of them at a time 1 or, a stride, of 64 bits."""

    def given(changes: dict[str, int]) -> Any:
        return replace(launch, arguments={**launch.arguments, **changes})

    integers = [
        p.name for p in launch.kernel.params if not p.is_constexpr and type(launch.arguments[p.name]) is int
    ]  # fmt: skip
    yield f"{name} all 1", given(dict.fromkeys(integers, 1))
    if not each:
        return
    for integer in integers:
        yield f"{name} {integer}=1", given({integer: 1})
        if len(integer) <= 3 or integer in STRIDES:
            yield f"{name} {integer}=2^31+16", given({integer: BEYOND})


def front_end(launch: Any) -> None:
    """Make triton's first intermediate code, on which a wrong type of an argument shows."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    target = GPUTarget("cuda", int(ARCH.removeprefix("sm_")), 32)
    source, backend = ASTSource(launch.kernel, *aot._specialised(launch)), make_backend(target)
    options = backend.parse_options(dict(launch.options, **source.parse_options()))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    given = (options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    if len(inspect.signature(source.make_ir).parameters) == 5:  # from triton 3.4 on
        given = (target, *given)
    source.make_ir(*given)


def main(arguments: list[str]) -> None:
    each, parts = arguments[0] == "each", arguments[1:]
    made = [
        variant
        for name, launch in launches()
        if not parts or any(part in name for part in parts)
        for variant in variants(name, launch, each)
    ]
    for name, launch in made:
        try:
            front_end(launch)
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            print(f"{name}: {type(error).__name__}: {said[-1][:200]}", flush=True)
    print(len(made))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main(sys.argv[1:])
