"""torch's GPU operators behind the Backend protocol. Without a GPU: the calls match the operators' schemas (on torch's
meta device), and their results are handled correctly (torch's CPU operator stands in for them)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention import dense
from attention.ring import simulated

from longctx.attention.backends import choose, fused_torch
from longctx.attention.backends.base import BackwardQueries, KeyBlock, StepGradients
from longctx.attention.backends.fused_torch import FusedTorchBackend
from longctx.attention.band import Rule
from longctx.attention.mask import BlockMask
from longctx.attention.scores import Scores
from longctx.errors import LongctxError
from longctx.layout import Span

from tolerances import tolerance

NAMES = ("flash", "cudnn")


def forward(name: str, q: Any, k: Any, v: Any, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As fused_torch._forward, on a CPU."""
    assert q.shape[1] == k.shape[1] and (not causal or q.shape[2] == k.shape[2]), "what the GPU's operators know"
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, scale=scale)


def backward(name: str, rows: BackwardQueries, k: Any, v: Any, causal: bool, scale: float) -> tuple[torch.Tensor, ...]:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return operator(rows.dout, rows.q, k, v, rows.out, rows.lse, 0.0, causal, scale=scale)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("ring", "causal"), [(1, True), (3, True), (2, False)])
def test_rings_equal_dense(ring: int, causal: bool, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_torch, "_forward", forward)
    monkeypatch.setattr(fused_torch, "_backward", backward)
    monkeypatch.setattr("attention.ring.choose_backend", lambda name, *_: FusedTorchBackend(name))
    g, length, rule = torch.Generator().manual_seed(0), 12 * ring, Rule(None, 0 if causal else None)
    shapes = (2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8), (2, 4, length, 8)
    inputs = tuple(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    got, _ = simulated(ring, layout, rule, inputs, backend="flash")
    index = torch.arange(length)
    truth = dense.attention(*inputs[:3], dense.visible(index, index, rule), 0.5, inputs[3])
    assert dense.difference(got, truth) <= tolerance("fp64")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [(16, 16), (12, 20), (20, 12)])
def test_the_operators_are_called_as_they_want(name: str, lengths: tuple[int, int]) -> None:
    """On the meta device: names, order and kinds of arguments, shapes of results."""
    heads = ((4, lengths[0]), (2, lengths[1]), (2, lengths[1]))
    q, k, v = (torch.empty(2, h, t, 64, dtype=torch.bfloat16, device="meta") for h, t in heads)
    mask = BlockMask((Span(0, lengths[0]),), (Span(0, lengths[1]),), Rule(None, 0))
    backend, scores = FusedTorchBackend(name), Scores(0.1)
    out, lse = q.new_empty(q.shape, dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)
    block = KeyBlock(k, v, mask, scores)
    backend.forward_step(q, block, out, lse, True)
    dq, dk, dv = (x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v))
    rows = BackwardQueries(q, out.to(q.dtype), lse, q, None)
    backend.backward_step(backend.prepare_backward(rows), block, StepGradients(dq, dk, dv, None), True)


def test_the_gradient_of_the_lse_is_left_to_our_kernels() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, 16, 8, generator=g) for _ in range(4))
    dlse, mask, scores = (
        torch.randn(1, 2, 16, generator=g),
        BlockMask((Span(0, 16),), (Span(0, 16),), Rule(None, 0)),
        Scores(0.3),
    )
    index = torch.arange(16)
    truth = dense.attention(q, k, v, dense.visible(index, index, mask.rule), 0.3, dout, dlse)
    rows = BackwardQueries(q, truth.out.float(), truth.lse.float(), dout, dlse)
    backend, grads = FusedTorchBackend("flash"), [torch.empty_like(x) for x in (q, k, v)]
    block = KeyBlock(k, v, mask, scores)
    backend.backward_step(backend.prepare_backward(rows), block, StepGradients(*grads, None), True)
    for ours, theirs in zip(grads, (truth.dq, truth.dk, truth.dv), strict=True):
        assert (ours - theirs).abs().max() <= tolerance("fp32") * theirs.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dim", "dtype", "scores", "plain", "message"),
    [
        (64, torch.bfloat16, Scores(1.0), True, ""),
        (64, torch.bfloat16, Scores(1.0), False, "documents"),
        (64, torch.bfloat16, Scores(1.0, softcap=1.0), True, "softcap"),
        (64, torch.float32, Scores(1.0), True, "float16"),
        (60, torch.bfloat16, Scores(1.0), True, "multiples of 8"),
        (264, torch.bfloat16, Scores(1.0), True, "up to"),
    ],
)
def test_what_they_cannot_do(
    name: str, dim: int, dtype: torch.dtype, scores: Scores, plain: bool, message: str
) -> None:
    q = torch.empty(1, 1, 8, dim, dtype=dtype, device="meta")
    problem = fused_torch.problem(name, q, q, scores, plain)
    assert message in problem and bool(problem) == bool(message)


def test_refused_without_a_gpu() -> None:
    q = torch.empty(1, 1, 8, 64, dtype=torch.bfloat16)
    with pytest.raises(LongctxError, match="NVIDIA"):
        choose.choose_backend("cudnn", q, q, Scores(1.0), "causal")
