"""Softcap, sink, ALiBi and dropout, each alone and together, against dense fp64 attention: one device and rings."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import pytest
import torch
from attention import dense, extras
from attention.ring import simulated
from hypothesis import given, settings
from hypothesis import strategies as st

import longctx
from longctx import block_attention, ring_attention
from longctx.attention.band import Rule, make_rule
from longctx.layout import get_layout

from distributed import run_ranks
from tolerances import tolerance

some_extras = st.lists(st.sampled_from(extras.NAMES), min_size=1, max_size=4, unique=True).map("+".join)
limits = st.one_of(st.none(), st.integers(0, 40))


def tensors(rows: int, cols: int, heads: tuple[int, int] = (4, 2), seed: int = 0) -> tuple[torch.Tensor, ...]:
    """q, k, v, dout, dlse in fp64: two batch rows, d_v != d_k."""
    g = torch.Generator().manual_seed(seed)
    h, kv = heads
    shapes = (2, h, rows, 6), (2, kv, cols, 6), (2, kv, cols, 5), (2, h, rows, 5), (2, h, rows)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)


def differentiated(function: Any, inputs: tuple[torch.Tensor, ...], given: dense.Extras) -> dense.Results:
    """function(q, k, v, **extras) -> (out, lse), and all gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    arguments = extras.arguments(given)
    for name in ("sink", "alibi"):
        if arguments[name] is not None:
            arguments[name] = arguments[name].clone().requires_grad_()
            leaves.append(arguments[name])
    out, lse = function(*leaves[:3], **arguments)
    objective = (out * inputs[3]).sum() + (lse.masked_fill(lse == -math.inf, 0.0) * inputs[4]).sum()
    dq, dk, dv, *rest = torch.autograd.grad(objective, leaves)
    others = iter(rest)
    per_head = (dense.NONE if x is None else next(others) for x in (given.sink, given.alibi))
    return dense.Results(out.detach(), lse.detach(), dq, dk, dv, *per_head)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 70),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 60)),
    q_offset=st.one_of(st.none(), st.integers(-5, 70)),
    documents=st.sampled_from([None, 3]),
    names=some_extras,
    seed=st.integers(0, 2**31),
)
def test_one_device_equals_dense(
    rows: int, cols: int, heads: Any, causal: bool, window: Any, q_offset: Any, documents: Any, names: str, seed: int
) -> None:
    inputs, given_extras = tensors(rows, cols, heads, seed), extras.make(names, heads[0], 2, seed)
    g = torch.Generator().manual_seed(seed)
    ids = [None, None]
    if documents:
        ids = [torch.randint(-1, documents, (2, n), generator=g).sort(1)[0] for n in (rows, cols)]
    offset = cols - rows if q_offset is None else q_offset
    call = partial(
        block_attention, causal=causal, window=window, q_offset=q_offset, document_ids=ids[0], key_document_ids=ids[1]
    )
    allowed = dense.visible(torch.arange(rows) + offset, torch.arange(cols), make_rule(causal, window))
    allowed = allowed & dense.same_document(*ids)
    truth = dense.attention(*inputs[:3], allowed, 6**-0.5, *inputs[3:], given_extras, offset)
    assert dense.difference(differentiated(call, inputs, given_extras), truth) <= tolerance("fp64")


def test_several_tiles_of_rows_and_columns() -> None:
    inputs, given_extras = tensors(600, 600, (2, 1)), extras.make(extras.TOGETHER, 2, 2)
    index = torch.arange(600)
    allowed = dense.visible(index, index, make_rule(True, None))
    truth = dense.attention(*inputs[:3], allowed, 6**-0.5, *inputs[3:], given_extras)
    assert dense.difference(differentiated(block_attention, inputs, given_extras), truth) <= tolerance("fp64")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    inputs, given_extras = tensors(64, 64), extras.make(extras.TOGETHER, 4, 2)
    lower = tuple(x.to(dtype) for x in inputs)
    index = torch.arange(64)
    allowed = dense.visible(index, index, make_rule(True, None))
    truth = dense.attention(*lower[:3], allowed, 6**-0.5, *lower[3:], given_extras)
    got = differentiated(block_attention, lower, given_extras)
    for ours, true in zip(got, truth, strict=True):
        name = "fp32" if dtype == torch.float32 else "bf16 result"
        assert float((ours.double() - true).abs().max() / true.abs().max()) <= tolerance(name)


@settings(deadline=None, max_examples=40)
@given(
    layout=st.sampled_from(["contiguous", "zigzag", "striped"]),
    ring=st.integers(1, 5),
    tokens=st.integers(1, 60),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    rule=st.builds(Rule, limits, limits, st.one_of(st.none(), st.integers(1, 60))),
    documents=st.sampled_from([None, 1, 3]),
    names=some_extras,
    seed=st.integers(0, 2**31),
)
def test_rings_equal_dense(
    layout: str, ring: int, tokens: int, heads: Any, rule: Rule, documents: Any, names: str, seed: int
) -> None:
    length = get_layout(layout).padded_length(tokens, ring)
    inputs, given_extras = tensors(length, length, heads, seed), extras.make(names, heads[0], 2, seed)
    ids = None
    if documents is not None:
        ids = torch.randint(-1, documents, (2, length), generator=torch.Generator().manual_seed(seed)).sort(1)[0]
    backend = "aten" if names == "sink" else "reference"
    results, _ = simulated(ring, layout, rule, inputs, ids, backend=backend, extras=given_extras)
    index = torch.arange(length)
    allowed = dense.visible(index, index, rule) & dense.same_document(ids, ids)
    truth = dense.attention(*inputs[:3], allowed, 0.5, *inputs[3:], given_extras)
    assert dense.difference(results, truth) <= tolerance("fp64")


@cache
def ring_mesh(ring: int) -> longctx.Mesh:
    return longctx.Mesh(ring=ring)


def worker(rank: int, world: int, length: int) -> dict[str, dense.Results]:
    """One rank's results with every option: causal, windowed and packed at once where there are several."""
    index = dense.parts("zigzag", world, length)[rank]
    inputs = tuple(x[:, :, index].contiguous() for x in tensors(length, length))
    return {
        names: differentiated(
            partial(ring_attention, mesh=ring_mesh(world), return_lse=True, **case(names, length, index)),
            inputs,
            extras.make(names, 4, 2),
        )
        for names in (*extras.NAMES, extras.TOGETHER)
    }


def case(names: str, length: int, index: torch.Tensor) -> dict[str, Any]:
    if "+" not in names:
        return {}
    documents = (torch.arange(length) * 3 // length).expand(2, -1).clone()
    documents[1, length // 2 : length // 2 + 4] = -1
    return {"window": 17, "document_ids": documents[:, index].contiguous(), "length": length - 3}


@pytest.mark.parametrize("ring", [1, 2, 3, 4])
def test_rings_of_processes_equal_dense(ring: int) -> None:
    length = 12 * ring
    answers, inputs, index = run_ranks(ring, worker, length), tensors(length, length), torch.arange(length)
    order = torch.cat(dense.parts("zigzag", ring, length)).argsort()
    for names in answers[0]:
        *by_token, dsink, dalibi = zip(*(answer[names] for answer in answers), strict=True)
        whole = (torch.cat(parts, 2)[:, :, order] for parts in by_token)
        got = dense.Results(*whole, torch.stack(dsink).sum(0), torch.stack(dalibi).sum(0))
        arguments = case(names, length, index)
        ids = arguments.get("document_ids")
        rule = make_rule(True, arguments.get("window"), arguments.get("length"))
        allowed = dense.visible(index, index, rule) & dense.same_document(ids, ids)
        truth = dense.attention(*inputs[:3], allowed, 6**-0.5, *inputs[3:], extras.make(names, 4, 2))
        assert dense.difference(got, truth) <= tolerance("fp64"), names


@pytest.mark.parametrize("names", [*extras.NAMES, extras.TOGETHER])
def test_gradcheck(names: str) -> None:
    given_extras = extras.make(names, 2, 2)
    q, k, v, *_ = (x.requires_grad_() for x in tensors(6, 7, (2, 1)))
    heads = tuple(x.requires_grad_() for x in (given_extras.sink, given_extras.alibi) if x is not None)

    def function(q: Any, k: Any, v: Any, *_: Any) -> Any:
        return block_attention(q, k, v, window=4, **extras.arguments(given_extras))

    assert torch.autograd.gradcheck(function, (q, k, v, *heads))


def test_rows_that_see_nothing_have_the_sink_as_their_lse() -> None:
    inputs, sink = tensors(8, 5), torch.tensor([1.0, -2.0, 0.0, 3.0])
    for backend in ("aten", "reference"):
        out, lse = block_attention(*inputs[:3], sink=sink, backend=backend)
        assert torch.equal(out[:, :, :3], torch.zeros_like(out[:, :, :3]))
        assert torch.equal(lse[:, :, :3], sink.double()[None, :, None].expand(2, 4, 3))


def test_a_gradient_that_nobody_asked_for_is_none() -> None:
    q, k, v, *_ = tensors(8, 8)
    sink = torch.zeros(4).requires_grad_()
    block_attention(q, k, v, sink=sink, alibi=torch.ones(4))[0].sum().backward()
    assert sink.grad is not None and sink.grad.dtype == torch.float32


def test_auto_names_what_the_fused_operator_cannot_do(caplog: pytest.LogCaptureFixture) -> None:
    from longctx.attention.backends import choose

    choose._announce.cache_clear()
    with caplog.at_level("INFO", "longctx"):
        for _ in range(2):
            block_attention(*tensors(2, 2)[:3], softcap=2.0, alibi=torch.ones(4))
        block_attention(*tensors(2, 2)[:3], sink=torch.ones(4))
    said = [r.message for r in caplog.records if "attention on cpu" in r.message]
    assert len(said) == 2 and "'reference'" in said[0] and "softcap and alibi" in said[0] and "'aten'" in said[1]
