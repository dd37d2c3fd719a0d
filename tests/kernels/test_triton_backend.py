"""backend="triton" through the public functions: the same answers, traced, and by name what it cannot do."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from longctx import LongctxError, block_attention, ring_attention
from longctx.attention.backends.choose import choose_backend
from longctx.attention.scores import Scores

from tolerances import tolerance


def tensors(rows: int = 20, cols: int = 33, dtype: torch.dtype = torch.float32, dim: int = 8) -> list[torch.Tensor]:
    """q, k, v."""
    g = torch.Generator().manual_seed(0)
    shapes = (2, 4, rows, dim), (2, 2, cols, dim), (2, 2, cols, dim)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


@pytest.mark.parametrize("q_offset", [None, 0, 40, -30])
def test_queries_may_start_anywhere(q_offset: int | None) -> None:
    results = []
    for backend in ("triton", "reference"):
        q, k, v = (x.requires_grad_() for x in tensors())
        out, lse = block_attention(q, k, v, q_offset=q_offset, window=25, backend=backend)
        grads = torch.autograd.grad((out * out).sum() + lse[lse > -torch.inf].sum(), (q, k, v))
        results.append((out, lse.masked_fill(lse == -torch.inf, 0.0), *grads))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= tolerance("fp32") * theirs.abs().max().clamp(min=1.0)


def test_ring_of_one_takes_every_option() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(24, 24))
    sink, slopes = (torch.rand(4).requires_grad_() for _ in range(2))
    ids = torch.arange(24).div(7, rounding_mode="floor").expand(2, -1)
    grads = {}
    for backend in ("triton", "reference"):
        out = ring_attention(
            q, k, v, document_ids=ids, length=22, softcap=2.0, sink=sink, alibi=slopes, dropout_p=0.3, dropout_seed=5,
            backend=backend,
        )  # fmt: skip
        grads[backend] = (out, *torch.autograd.grad((out * out).sum(), (q, k, v, sink, slopes)))
    for ours, theirs in zip(*grads.values(), strict=True):
        assert (ours - theirs).abs().max() <= tolerance("fp32") * theirs.abs().max().clamp(min=1.0)


def test_one_node_in_a_graph() -> None:
    """No graph break: the operator is opaque to the compiler, whatever computes it."""
    graphs = []

    def look(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda *x: block_attention(*x, backend="triton")[0] * 2, backend=look, fullgraph=True)
    torch.testing.assert_close(compiled(*tensors()), block_attention(*tensors(), backend="triton")[0] * 2)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (tensors(dtype=torch.float64), "float64"),
        (tensors(dtype=torch.bfloat16), "bfloat16"),
        (tensors(dim=257), "257"),
    ],
)
def test_what_it_cannot_do_is_named(given: list[torch.Tensor], message: str) -> None:
    with pytest.raises(LongctxError, match=message):
        block_attention(*given, backend="triton")


def test_without_a_gpu_or_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    q, _, v = tensors()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(LongctxError, match="GPU"):
        choose_backend("triton", q, v, Scores(1.0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LongctxError, match="not installed"):
        choose_backend("triton", q, v, Scores(1.0))


def test_attention_on_a_cpu_never_imports_triton_of_ours() -> None:
    """Machines without triton: everything but the Triton backend works."""
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "import longctx\n"
        "x = torch.randn(1, 1, 4, 8)\n"
        "assert longctx.block_attention(x, x, x)[0].isfinite().all()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_auto_on_a_gpu_is_ours_where_it_can() -> None:
    from longctx.attention.backends import choose

    half, single, double, wide = (
        torch.empty(1, 1, 1, dim, dtype=dtype, device="meta")
        for dim, dtype in ((64, torch.bfloat16), (64, torch.float32), (64, torch.float64), (512, torch.float16))
    )
    for x, expected in ((half, "triton"), (single, "triton"), (double, "reference"), (wide, "reference")):
        assert choose.fastest(x, x, "cuda", Scores(1.0))[0] == expected
