"""block_attention on one device against dense fp64 attention: every option, both backends, and the errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention import dense
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx import block_attention
from longctx.attention.backends import aten
from longctx.attention.band import Kind, Tile, make_rule

from tolerances import tolerance

BACKENDS = ("aten", "reference")


def tensors(
    rows: int, cols: int, heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (8, 8), seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """q, k, v, dout, dlse in fp64."""
    g = torch.Generator().manual_seed(seed)
    (h, kv), (d_k, d_v) = heads, dims
    shapes = (2, h, rows, d_k), (2, kv, cols, d_k), (2, kv, cols, d_v), (2, h, rows, d_v), (2, h, rows)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)


def run(inputs: tuple[torch.Tensor, ...], **arguments: Any) -> dense.Results:
    """block_attention and its gradients."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out, lse = block_attention(q, k, v, **arguments)
    dout, dlse = (x.to(out.dtype) for x in inputs[3:])
    objective = (out * dout).sum() + (lse.masked_fill(lse == -math.inf, 0.0) * dlse.to(lse.dtype)).sum()
    return dense.Results(out.detach(), lse.detach(), *torch.autograd.grad(objective, (q, k, v)))


def expected(
    inputs: tuple[torch.Tensor, ...],
    *,
    causal: bool = True,
    window: Any = None,
    q_offset: int | None = None,
    scale: float | None = None,
    document_ids: torch.Tensor | None = None,
    key_document_ids: torch.Tensor | None = None,
) -> dense.Results:
    q, k, v, dout, dlse = inputs
    offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    rows, cols = torch.arange(q.shape[2]) + offset, torch.arange(k.shape[2])
    allowed = dense.visible(rows, cols, make_rule(causal, window))
    allowed = allowed & dense.same_document(
        document_ids, document_ids if key_document_ids is None else key_document_ids
    )
    return dense.attention(q, k, v, allowed, q.shape[-1] ** -0.5 if scale is None else scale, dout, dlse)


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 700),
    cols=st.integers(1, 700),
    heads=st.sampled_from([(1, 1), (4, 2), (4, 1), (3, 3)]),
    dims=st.sampled_from([(8, 8), (6, 3), (3, 7), (1, 1)]),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 600), st.tuples(st.integers(-1, 300), st.integers(-1, 300))),
    q_offset=st.one_of(st.none(), st.integers(-20, 700)),
    documents=st.sampled_from([None, 1, 4, 60]),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**31),
)
def test_equals_dense(
    rows: int,
    cols: int,
    heads: Any,
    dims: Any,
    causal: bool,
    window: Any,
    q_offset: Any,
    documents: Any,
    backend: str,
    seed: int,
) -> None:
    inputs = tensors(rows, cols, heads, dims, seed)
    arguments: dict[str, Any] = {"causal": causal, "window": window, "q_offset": q_offset}
    if documents is not None:
        g = torch.Generator().manual_seed(seed)
        arguments["document_ids"] = torch.randint(-1, documents, (2, rows), generator=g).sort(1)[0]
        arguments["key_document_ids"] = torch.randint(-1, documents, (2, cols), generator=g).sort(1)[0]
    difference = dense.difference(run(inputs, backend=backend, **arguments), expected(inputs, **arguments))
    assert difference <= tolerance("fp64")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_fp32(backend: str, causal: bool) -> None:
    inputs = tuple(x.float() for x in tensors(600, 600))
    truth = expected(inputs, causal=causal)
    assert dense.difference(run(inputs, causal=causal, backend=backend), truth) <= tolerance("fp32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_bottom_right_is_the_default_and_top_left_is_offset_zero(backend: str) -> None:
    inputs = tensors(3, 10)
    assert dense.difference(run(inputs, backend=backend), expected(inputs, q_offset=7)) <= tolerance("fp64")
    sdpa = torch.nn.functional.scaled_dot_product_attention(*inputs[:3], is_causal=True, enable_gqa=True)
    out, _ = block_attention(*inputs[:3], q_offset=0, backend=backend)
    torch.testing.assert_close(out, sdpa, rtol=0, atol=tolerance("fp64"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_see_nothing_are_zero_with_no_gradient(backend: str, dtype: torch.dtype) -> None:
    inputs = tuple(x.to(dtype) for x in tensors(8, 5))  # bottom-right: the first three rows come before every key
    documents = torch.zeros(2, 8, dtype=torch.int32), torch.zeros(2, 5, dtype=torch.int32)
    documents[0][1, 6] = -1
    result = run(inputs, document_ids=documents[0], key_document_ids=documents[1], backend=backend)
    blind = torch.zeros(2, 4, 8, dtype=torch.bool)
    blind[:, :, :3] = blind[1, :, 6] = True
    assert torch.equal(result.lse == -math.inf, blind)
    for x in (result.out, result.dq):
        assert torch.equal(x[blind], torch.zeros_like(x[blind])) and x.isfinite().all()
    assert result.dk.isfinite().all() and result.dv.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_ten_thousand(backend: str) -> None:
    inputs = tensors(64, 64)
    inputs = (
        inputs[0] / inputs[0].norm(dim=-1, keepdim=True),
        inputs[1] / inputs[1].norm(dim=-1, keepdim=True),
        *inputs[2:],
    )
    truth = expected(inputs, scale=1e4)
    assert truth.lse.abs().max() > 9e3
    result = run(inputs, scale=1e4, backend=backend)
    for got, true in zip(result, truth, strict=True):
        assert (got - true).abs().max() <= tolerance("fp64") * true.abs().max().clamp(min=1)
    single = run(tuple(x.float() for x in inputs), scale=1e4, backend=backend)
    assert all(x.isfinite().all() for x in single)


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (5, 1)])
def test_some_heads_of_a_group_at_a_time(heads: tuple[int, int], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long sequences are computed: each call takes some query heads, and the one key head that they share."""
    monkeypatch.setattr(aten, "MIN_WORK", at_once * 40 * 40)
    monkeypatch.setattr(aten, "TILE", 16)
    inputs = tuple(x[:1] for x in tensors(40, 40, heads=heads, dims=(6, 5)))
    groups = list(aten._head_groups(inputs[0], inputs[1], Tile(Kind.FULL, 0, 40, 0, 40)))
    shared = heads[0] // heads[1]
    assert max(group.q.stop - group.q.start for group in groups) == min(at_once, shared)
    assert dense.difference(run(inputs, backend="aten"), expected(inputs)) <= tolerance("fp64")


@pytest.mark.parametrize("scale", [-0.4, 0.0, -1e-3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_of_any_sign(backend: str, causal: bool, scale: float) -> None:
    """A negative scale prefers what is unlike, 0 takes the mean; alone, with a window, and with documents."""
    ids = torch.arange(600).div(250, rounding_mode="floor").expand(2, -1)
    for more in ({}, {"window": 40}, {"document_ids": ids}):
        inputs = tensors(600, 600, heads=(4, 2), dims=(6, 5))
        found = run(inputs, scale=scale, causal=causal, backend=backend, **more)
        assert dense.difference(found, expected(inputs, scale=scale, causal=causal, **more)) <= tolerance("fp64"), more


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_of_nothing_is_no_sink(backend: str) -> None:
    """-inf in some head, also where a row sees no key at all: no NaN, and the gradient of no sink."""
    q, k, v, dout, dlse = tensors(20, 20)
    ids = torch.zeros(2, 20, dtype=torch.int64).index_fill(1, torch.tensor([0, 3, 19]), -1)
    sink = torch.tensor([-math.inf, 0.5, -math.inf, -math.inf], dtype=torch.float64).requires_grad_()
    plain = run((q, k, v, dout, dlse), document_ids=ids, backend=backend)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = block_attention(*leaves, document_ids=ids, sink=sink, backend=backend)
    objective = (out * dout).sum() + (lse.masked_fill(lse == -math.inf, 0.0) * dlse).sum()
    dq, dsink = torch.autograd.grad(objective, (leaves[0], sink))
    assert dsink.isfinite().all() and not dsink[[0, 2, 3]].any() and dsink[1] != 0
    for found, wanted in ((out, plain.out), (lse, plain.lse), (dq, plain.dq)):
        torch.testing.assert_close(found[:, [0, 2, 3]], wanted[:, [0, 2, 3]], rtol=0, atol=tolerance("fp64"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_orders_and_broadcast_gradients_are_read_rightly(backend: str) -> None:
    """Transposed heads, sliced rows, a last dimension that is not dense, and the expanded gradient of sum()."""
    q, k, v, dout, dlse = tensors(40, 40)
    strange = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.mT.contiguous().mT,
        torch.cat([v, v], 2)[:, :, 40:],
        torch.ones(()).double().expand_as(dout),
        dlse,
    )
    assert dense.difference(run(strange, backend=backend), expected(strange)) <= tolerance("fp64")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    q, k, v, *_ = (x[:1, :2].requires_grad_() for x in tensors(6, 7, dims=(4, 3)))

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return block_attention(q, k[:, :1], v[:, :1], window=4, backend=backend)

    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_lse_can_be_differentiated_alone(backend: str) -> None:
    inputs = tensors(20, 20)
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    (block_attention(q, k, v, backend=backend)[1] * inputs[4]).sum().backward()
    truth = expected((*inputs[:3], torch.zeros_like(inputs[3]), inputs[4]))
    torch.testing.assert_close(q.grad, truth.dq, rtol=0, atol=tolerance("fp64"))
    torch.testing.assert_close(k.grad, truth.dk, rtol=0, atol=tolerance("fp64"))


def test_auto_says_once_what_it_picked(caplog: pytest.LogCaptureFixture) -> None:
    from longctx.attention.backends import choose

    choose._announce.cache_clear()
    with caplog.at_level("INFO", "longctx"):
        for _ in range(2):
            block_attention(*tensors(2, 2)[:3])
    assert [r.message for r in caplog.records if "attention on cpu: backend 'aten'" in r.message] == [
        caplog.records[0].message
    ]
