"""The kernels where they are meant to run. `TRITON_INTERPRET=0 python -m pytest -m gpu` on a machine with a GPU: bf16,
fp16 and fp32 against dense fp64 attention, every option, whole rings in one process, at sizes of many real tiles. The
same bodies run small in the interpreter by default, so that they are no dead code."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest
import torch
from attention import dense, extras
from attention.ring import simulated

from longctx import abc_attention, cosine_attention
from longctx.attention.backends.choose import choose_backend, pattern_of
from longctx.attention.band import Rule
from longctx.attention.scores import Scores
from longctx.decode.attend import decode_attention
from longctx.errors import AttentionError

from tolerances import tolerance

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case(NamedTuple):
    """A ring of a layout; the window and the padding are shares of the length."""

    ring: int
    layout: str
    causal: bool = True
    window: float | None = None
    padding: float = 0.0
    documents: int = 0
    names: str = ""


CASES = {
    "causal": Case(1, "contiguous"),
    "full": Case(3, "contiguous", causal=False),
    "zigzag": Case(2, "zigzag"),
    "window": Case(2, "zigzag", window=0.3),
    "documents": Case(2, "striped", padding=0.2, documents=3),
    "extras": Case(2, "zigzag", names=extras.TOGETHER),
}


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda":
        assert torch.cuda.is_available(), "-m gpu is for machines with one"
        assert os.environ["TRITON_INTERPRET"] == "0", "run TRITON_INTERPRET=0 python -m pytest -m gpu"
    return torch.device(request.param)


def on(device: str, *values: Any) -> Any:
    return pytest.param(device, *values, marks=pytest.mark.gpu if device == "cuda" else (), id=f"{device}-{values}")


def tensors(
    device: torch.device, dtype: str, length: int, heads: tuple[int, int], dim: int
) -> tuple[torch.Tensor, ...]:
    """q, k, v, dout in `dtype`, dlse in fp32."""
    g, (h, kv) = torch.Generator().manual_seed(0), heads
    shapes = (h, length, dim), (kv, length, dim), (kv, length, dim), (h, length, dim), (h, length)
    made = [torch.randn((2, *shape), generator=g) for shape in shapes]
    return *(x.to(device, DTYPES[dtype]) for x in made[:4]), made[4].to(device)


def check(case: Case, inputs: tuple[torch.Tensor, ...], backend: str, dtype: str) -> None:
    """A simulated ring, forward and every gradient, against dense fp64 attention on the CPU."""
    q, device, length = inputs[0], inputs[0].device, inputs[0].shape[2]
    left = None if case.window is None else max(1, int(case.window * length))
    valid = length - int(case.padding * length) if case.padding else None
    rule, documents, scale = Rule(left, 0 if case.causal else None, valid), None, q.shape[-1] ** -0.5
    if case.documents:
        documents = (torch.arange(length) * case.documents // length).expand(2, -1).contiguous()
    given = extras.make(case.names, q.shape[1], 2)
    moved = dense.Extras(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in given))
    single = moved._replace(
        **{name: x.float() for name in ("sink", "alibi") if (x := getattr(moved, name)) is not None}
    )
    ids = None if documents is None else documents.to(device)
    got, _ = simulated(case.ring, case.layout, rule, inputs, ids, scale, backend, single)
    index = torch.arange(length)
    allowed = dense.visible(index, index, rule) & dense.same_document(documents, documents)
    rounded = given._replace(
        **{name: x.cpu() for name in ("sink", "alibi") if (x := getattr(single, name)) is not None}
    )
    exact = [x.cpu() for x in inputs]
    truth = dense.attention(*exact[:3], allowed, scale, exact[3], exact[4] if len(exact) > 4 else None, rounded)
    assert dense.relative_difference(got, truth) <= tolerance(dtype)


@pytest.mark.parametrize(
    ("device", "dtype", "backend", "name"),
    [
        *(on("cpu", "fp16", "triton", name) for name in CASES),
        *(on("cpu", "fp16", "triton-tma", name) for name in ("documents",)),
        *(on("cuda", dtype, "triton", name) for dtype in DTYPES for name in CASES),
        *(on("cuda", dtype, "triton-tma", name) for dtype in ("bf16", "fp16") for name in CASES),
        *(on("cuda", "bf16", backend, name) for backend in ("cudnn", "flash") for name in ("causal", "full", "zigzag")),
    ],
    indirect=["device"],
)
def test_rings_equal_dense(device: torch.device, dtype: str, backend: str, name: str) -> None:
    """On a GPU that has not what a backend needs, it says so by name."""
    case, small = CASES[name], device.type == "cpu"
    inputs = tensors(device, dtype, 24 if small else 1536, (2, 1) if small else (8, 2), 16 if small else 128)
    if backend in ("cudnn", "flash"):
        inputs = inputs[:4]  # they know no gradient of the lse
    q, _, v, *_ = inputs
    try:
        choose_backend(backend, q, v, Scores(1.0), pattern_of(Rule(None, 0), None))
    except AttentionError as error:
        assert backend != "triton" and "needs" in str(error) and torch.cuda.get_device_capability() != (9, 0)
        return
    check(case, inputs, backend, dtype)


@pytest.mark.parametrize(
    ("device", "dtype", "dim"),
    [
        on("cpu", "fp32", 24),
        *(on("cuda", dtype, dim) for dtype in DTYPES for dim in (16, 64, 80, 128, 192, 256)),
    ],
    indirect=["device"],
)
def test_head_dimensions(device: torch.device, dtype: str, dim: int) -> None:
    """Lengths that no tile divides, with and without the extras that have tile shapes of their own."""
    for names in ("", "softcap+alibi+dropout"):
        length = 26 if device.type == "cpu" else 700
        check(Case(1, "contiguous", names=names), tensors(device, dtype, length, (2, 1), dim), "triton", dtype)


@pytest.mark.parametrize("device", [on("cpu"), on("cuda")], indirect=True)
def test_the_same_every_time(device: torch.device) -> None:
    """To the bit, at a size where programs would race if they could."""
    small = device.type == "cpu"
    inputs = tensors(device, "fp16", 24 if small else 4096, (2, 1) if small else (16, 4), 16 if small else 64)
    first, second = (simulated(2, "zigzag", Rule(None, 0), inputs, backend="triton")[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("device", "dtype", "operator", "length"),
    [
        pytest.param("cpu", "fp16", "abc", 11, marks=pytest.mark.deep),
        on("cpu", "fp16", "cosine", 11),
        *(on("cuda", d, name, n) for d in DTYPES for name in ("abc", "cosine") for n in (5, 64, 1536)),
    ],
    indirect=["device"],
)
def test_bounded_memories(device: torch.device, dtype: str, operator: str, length: int) -> None:
    """From one chunk to many, with and without documents, one of whose ids comes back: output and every gradient."""
    g, dim = torch.Generator().manual_seed(0), 16 if device.type == "cpu" else 64
    shapes = [(2, 4, length, dim), (2, 2, length, dim), (2, 2, length, dim)]
    shapes.append((2, 2, length, 16) if operator == "abc" else (4,))
    made = [torch.randn(shape, generator=g).to(DTYPES[dtype]) for shape in shapes]
    weight = torch.randn(shapes[0], generator=g).to(DTYPES[dtype])
    ids = torch.tensor([1, 2, -1, 1]).repeat_interleave(-(-length // 4))[:length].expand(2, -1)
    attend = abc_attention if operator == "abc" else cosine_attention
    for documents in (None, ids):
        both = []
        for backend, where, kind in (("triton", device, DTYPES[dtype]), ("chunked", "cpu", torch.float64)):
            leaves = [x.to(where, kind).requires_grad_() for x in made]
            given = None if documents is None else documents.to(where)
            out = attend(*leaves, document_ids=given, backend=backend)
            both.append([out.detach(), *torch.autograd.grad(out, leaves, weight.to(out))])
        for ours, theirs in zip(*both, strict=True):
            apart = (ours.cpu().double() - theirs).abs().max()
            assert apart <= tolerance(dtype) * theirs.abs().max().clamp_min(1.0), (documents is None, apart)


DECODING = {
    "el": (4, 16, 1, 1024, 1024, True),
    "el, 768": (1, 12, 1, 768, 768, True),
    "el, 1600": (2, 25, 1, 1600, 1600, True),
    "el, 5120": (1, 40, 1, 5120, 5120, True),
    "mla": (1, 128, 1, 576, 512, True),
    "mqa": (1, 32, 1, 128, 128, False),
    "gqa": (1, 32, 8, 128, 128, False),
    "gqa, 256": (2, 8, 4, 256, 256, False),
}
"""(beams, H, G, Dk, Dv, whether values are columns of the keys)."""


@pytest.mark.parametrize(
    ("device", "dtype", "name"),
    [
        *(on("cpu", "fp16", name) for name in ("mla", "gqa")),
        *(on("cuda", d, name) for d in DTYPES for name in DECODING),
    ],
    indirect=["device"],
)
def test_decoding(device: torch.device, dtype: str, name: str) -> None:
    """One new token against a long context, plain and with everything that joins a logit; twice the same bits."""
    beams, heads, groups, d_k, d_v, same = DECODING[name]
    keys = 3001
    if device.type == "cpu":
        heads, groups, d_k, d_v, keys = 2 * groups, groups // 4 or 1, d_k // 16, d_v // 16, 50
    g = torch.Generator().manual_seed(0)
    shapes = (2 * beams, heads, 1, d_k), (2, groups, keys, d_k), (2, groups, keys, d_v)
    q, k, v = (torch.randn(shape, generator=g).to(DTYPES[dtype]) for shape in shapes)
    mask = torch.rand((2 * beams, 1, 1, keys), generator=g) < 0.5
    mask[0] = False
    extras = {
        "mask": mask, "softcap": 20.0, "alibi": torch.rand(heads, generator=g) * 0.1, "sink": torch.zeros(heads),
        "lengths": torch.tensor([keys, keys // 3]),
    }  # fmt: skip
    for options in ({}, extras):
        moved = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
        given = {"value_width": d_v} if same else {"v": v.to(device)}
        results = [
            decode_attention(q.to(device), k.to(device), **given, **moved, causal=True, backend="triton", splits=n)
            for n in (None, None, 3)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
        exact = {"value_width": d_v} if same else {"v": v.double()}
        truth = decode_attention(q.double(), k.double(), **exact, **options, causal=True, backend="torch")
        for found in results:
            for ours, theirs in zip(found, truth, strict=True):
                assert torch.equal(ours.cpu() == -torch.inf, theirs == -torch.inf)
                ours, theirs = (x.cpu().double().masked_fill(theirs == -torch.inf, 0.0) for x in (ours, theirs))
                assert (ours - theirs).abs().max() <= tolerance(dtype) * theirs.abs().max().clamp_min(1.0)
