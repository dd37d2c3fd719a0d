"""Compile the kernels for chips that are not here, and report what the compiler says of each.

Run as a process of its own, without TRITON_INTERPRET: `python tests/kernel_aot.py CASE...` prints one JSON object per
case; `--record [ARCH...]` writes them to kernels/flash/compiled.json. A case is arch-kind-pass-width.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

FLASH = Path(__file__).resolve().parents[1] / "kernels" / "flash"
RECORD = FLASH / "compiled.json"
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
PRODUCTS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
"""The tensor-core instruction that half precision must use; see `product`."""
NEWEST, OLDER_MAY_SPILL = "3.9.", 256
"""The triton of the record, with which nothing is spilled; bytes a thread that older ones may (docs/kernels.md)."""
SOURCES = ("elements", "forward", "backward_queries", "backward_keys")


class Case(NamedTuple):
    """One row of kernels/flash/tiles.py on one chip."""

    arch: str
    kind: str
    name: str
    width: int

    def __str__(self) -> str:
        return "-".join(map(str, self))

    @property
    def config(self) -> Any:
        from longctx.kernels.flash import tiles

        choose = tiles.choose_hopper if self.kind == "tma" else tiles.choose
        return choose(self.name, self.width, 4 if self.kind == "float" else 2, self.kind == "extras", self.arch)

    @property
    def hash(self) -> str:
        """Of the kernels' sources and the configuration: what a record stands for."""
        text = "".join((FLASH / f"{name}.py").read_text() for name in SOURCES) + f"{self} {tuple(self.config)}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Compiled:
    """What the compiler reports: registers and spilled bytes a thread, bytes of shared memory a program."""

    case: str
    hash: str
    registers: int
    spilled: int
    shared: int
    products: int
    triton: str
    copies: int = 0
    """Instructions of Hopper's copy engine."""


def cases() -> Iterator[Case]:
    """Every row of every chip; "tma" are those of sm_90 that read through descriptors."""
    from longctx.kernels.flash import tiles

    for arch in tiles.ARCHES:
        for kind, widths in tiles.WIDTHS.items():
            for name in tiles.PASSES:
                for width in widths:
                    yield Case(arch, kind, name, width)
    for name in tiles.PASSES:
        for width in tiles.WIDTHS["half"]:
            case = Case("sm_90", "tma", name, width)
            if case.config.described:
                yield case


def product(case: Case) -> str:
    """The tensor-core instruction of a case. In backward, 256 numbers a row or extras fill the registers: there some
    tiles have 32 rows, and wgmma and tcgen05 have no product that small."""
    backward = case.name != "forward" and (case.width == 256 or case.kind == "extras")
    small = backward and case.config.tile < 64 and case.arch in ("sm_90", "sm_100")
    return "mma.sync" if small else PRODUCTS[case.arch]


def parse(text: str) -> Case:
    arch, kind, name, width = text.split("-")
    return Case(arch, kind, name, int(width))


def launch(case: Case) -> Any:
    """The launch of a ring step in the middle of a pass: zigzag, two spans, grouped heads; with documents where there
    are extras. On torch's meta device: nothing is allocated."""
    import torch

    from longctx.attention.backends.triton import geometry
    from longctx.attention.band import Rule
    from longctx.attention.scores import Scores
    from longctx.kernels.flash import fused
    from longctx.layout import get_layout

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    length, dtype = 4096, torch.float32 if case.kind == "float" else torch.bfloat16
    q, k, v, dout = (empty(2, heads, length, case.width, dtype=dtype) for heads in (32, 8, 8, 32))
    scores = Scores(0.1)
    if case.kind == "extras":
        scores = Scores(0.1, 30.0, empty(32), 0.1, empty(2, dtype=torch.int64))
    spans = [get_layout("zigzag").spans(rank, 4, 4 * length) for rank in (2, 1)]
    choose = fused.tiles.choose_hopper if case.kind == "tma" else fused.tiles.choose
    step = fused.Step(q, k, v, geometry(*spans, Rule(None, 0)), None, scores, case.arch, choose)
    lse = empty(2, 32, length)
    rows = fused.Prepared(q, dout, lse, lse)
    if case.name == "forward":
        made = step.forward(empty(2, 32, length, case.width), lse, False)
    elif case.name == "queries":
        made, _ = step.queries(rows, empty(*q.shape), False)
    else:
        made = step.keys(rows, empty(*k.shape), empty(*v.shape))
    if case.kind != "extras":
        return made
    ids = empty(2, length, dtype=torch.int64)
    documents = {"q_documents": ids, "k_documents": ids, "DOCUMENTS": True, "range_batch": 1024}
    return replace(made, arguments={**made.arguments, **documents})


class Built(NamedTuple):
    """One launch compiled for one chip: numbers a thread, bytes a program, and the machine code as text."""

    registers: int
    spilled: int
    shared: int
    text: str


def build(made: Any, arch: str) -> Built:
    """Compile a launch for a chip that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # ptxas's words, printed where TRITON_DUMP_PTXAS_LOG=1
        built = triton.compile(ASTSource(made.kernel, *_specialised(made)), target=target, options=made.options)
    if amd:
        text = built.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.vgpr_{what}:\s+(\d+)", text)[1]) for what in ("count", "spill_count"))
        spilled *= 4
    else:
        text = built.asm["ptx"]
        registers = int(re.search(r"Used (\d+) registers", said.getvalue())[1])
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said.getvalue()))
    return Built(registers, spilled, built.metadata.shared, text)


def compile_case(case: Case) -> Compiled:
    import triton

    registers, spilled, shared, text = build(launch(case), case.arch)
    products = len(re.findall(re.escape(product(case)), text))
    copies = 0 if case.arch.startswith("gfx") else text.count("cp.async.bulk.tensor")
    return Compiled(str(case), case.hash, registers, spilled, shared, products, triton.__version__, copies)


def _specialised(made: Any) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """(signature, constants, attributes) of a launch, as triton's own just-in-time path makes them."""
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    types = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(made.kernel.params):
        value, name = made.arguments[parameter.name], parameter.name
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and free):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + types[value.dtype]
            attributes[place,] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{types[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and free:
                attributes[place,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def problems(compiled: Compiled) -> list[str]:
    """What a configuration must not be."""
    case, found = parse(compiled.case), []
    allowed = 0 if compiled.triton.startswith(NEWEST) else OLDER_MAY_SPILL
    if compiled.spilled > allowed and case.kind != "float":  # exact fp32 products are for checking, not for speed
        found.append(f"{compiled.case}: {compiled.spilled} bytes of registers spilled")
    if compiled.shared > SHARED_LIMIT[case.arch]:
        found.append(
            f"{compiled.case}: {compiled.shared} bytes of shared memory, the chip has {SHARED_LIMIT[case.arch]}"
        )
    if case.kind != "float" and not compiled.products:
        found.append(f"{compiled.case}: no {product(case)} in the machine code")
    if case.kind == "tma" and not compiled.copies:
        found.append(f"{compiled.case}: no cp.async.bulk.tensor in the machine code")
    return found


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--record"]:  # [ARCH...]: all, or those alone
        old = {entry["case"]: entry for entry in json.loads(RECORD.read_text())} if RECORD.exists() else {}
        new = {str(c): asdict(compile_case(c)) for c in cases() if c.arch in arguments[1:] or not arguments[1:]}
        made = [{**old, **new}[str(case)] for case in cases() if str(case) in old or str(case) in new]
        RECORD.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in made) + "\n]\n")
        return
    answer(arguments, lambda text: compile_case(parse(text)))


def answer(texts: list[str], compiled: Callable[[str], Any]) -> None:
    """Print one JSON object per case, its error if it has one."""
    for text in texts:
        try:
            print(json.dumps(asdict(compiled(text))), flush=True)
        except Exception as error:
            print(json.dumps({"case": text, "error": f"{type(error).__name__}: {error}"[:2000]}), flush=True)


def run(start: Callable[[list[str]], None]) -> None:
    """Call ``start`` with the compiler's log on and an empty cache, so that every kernel is compiled."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TRITON_CACHE_DIR"] = empty
        start(sys.argv[1:])


if __name__ == "__main__":
    run(main)
