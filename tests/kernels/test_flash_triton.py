"""The Triton kernels, interpreted, against dense fp64 attention: whole simulated rings, forward and all gradients.

What is not written is NaN (conftest.py), so a row, a tile or a padding that no program covers shows.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention import dense, extras
from attention.dense import relative_difference as error
from attention.ring import simulated
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention.backends.base import BackwardQueries
from longctx.attention.backends.triton import TritonBackend
from longctx.attention.band import Rule
from longctx.attention.comm import LocalLink
from longctx.attention.passes import Passes, split
from longctx.attention.scores import Scores
from longctx.kernels.flash.tiles import Config
from longctx.layout import get_layout

from tolerances import tolerance

limits = st.one_of(st.none(), st.integers(0, 40))
some_extras = st.lists(st.sampled_from(extras.NAMES), max_size=4, unique=True).map("+".join)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def tensors(
    length: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, seed: int = 0, batch: int = 2
) -> tuple[torch.Tensor, ...]:
    """q, k, v, dout in `dtype`, dlse in fp32."""
    g = torch.Generator().manual_seed(seed)
    (h, kv), (d_k, d_v) = heads, dims
    shapes = (h, length, d_k), (kv, length, d_k), (kv, length, d_v), (h, length, d_v), (h, length)
    made = [torch.randn((batch, *shape), generator=g) for shape in shapes]
    return *(x.to(dtype) for x in made[:4]), made[4]


def in_single(given: dense.Extras) -> dense.Extras:
    """Sink and slopes as fp32, which is what a backend gets."""
    sink, alibi = (None if x is None else x.float() for x in (given.sink, given.alibi))
    return given._replace(sink=sink, alibi=alibi)


def expected(
    inputs: tuple[torch.Tensor, ...], rule: Rule, documents: torch.Tensor | None, scale: float, given: dense.Extras
) -> dense.Results:
    index = torch.arange(inputs[0].shape[2])
    allowed = dense.visible(index, index, rule) & dense.same_document(documents, documents)
    return dense.attention(*inputs[:3], allowed, scale, *inputs[3:], given)


rings = st.fixed_dictionaries(
    {
        "ring": st.integers(1, 3),
        "layout": st.sampled_from(("contiguous", "zigzag", "striped")),
        "chunk": st.integers(1, 14),
        "heads": st.sampled_from([(1, 1), (2, 1), (4, 2)]),
        "dims": st.sampled_from([(8, 8), (16, 16), (20, 9), (5, 32)]),
        "left": limits,
        "right": limits,
        "cut": st.integers(0, 7),
        "packed": st.sampled_from([None, 2, 5]),
        "names": some_extras,
        "backend": st.sampled_from(("triton", "triton-tma")),
        "dtype": st.sampled_from(sorted(DTYPES)),
        "scale": st.sampled_from([0.5, -0.4, 0.0]),
        "seed": st.integers(0, 1000),
    }
)


def ring_equals_dense(drawn: dict[str, Any]) -> None:
    length = get_layout(drawn["layout"]).multiple(drawn["ring"]) * drawn["chunk"]
    rule = Rule(drawn["left"], drawn["right"], max(1, length - drawn["cut"]) if drawn["cut"] else None)
    inputs = tensors(length, drawn["heads"], drawn["dims"], DTYPES[drawn["dtype"]], drawn["seed"])
    documents = None
    if drawn["packed"] is not None:
        g = torch.Generator().manual_seed(drawn["seed"])
        documents = torch.randint(-1, drawn["packed"], (2, length), generator=g).sort(1).values
    chosen = in_single(extras.make(drawn["names"], drawn["heads"][0], 2, drawn["seed"]))
    got, _ = simulated(
        drawn["ring"], drawn["layout"], rule, inputs, documents, drawn["scale"], drawn["backend"], chosen
    )
    assert error(got, expected(inputs, rule, documents, drawn["scale"], chosen)) <= tolerance(drawn["dtype"])


@settings(max_examples=8)
@given(drawn=rings)
def test_rings_equal_dense(drawn: dict[str, Any]) -> None:
    ring_equals_dense(drawn)


@pytest.mark.slow
@settings(max_examples=150)
@given(drawn=rings)
def test_many_rings_equal_dense(drawn: dict[str, Any]) -> None:
    ring_equals_dense(drawn)


def local(
    inputs: tuple[torch.Tensor, ...], rule: Rule, choose: object = None, given: dense.Extras = dense.PLAIN
) -> dense.Results:
    """A ring of one, with tile sizes of one's own."""
    q, k, v, dout, dlse = inputs
    scores = Scores(0.3, given.softcap, given.alibi, given.dropout_p, given.seeds)
    backend = TritonBackend() if choose is None else TritonBackend(choose)
    passes = Passes(LocalLink(), "contiguous", rule, scores, backend)
    out, lse = passes.forward(q, k, v, None)
    dq, dkv, dalibi = passes.backward(BackwardQueries(q, out, lse, dout, dlse), k, v, None)
    return dense.Results(out, lse, dq, *split(dkv, k, v), dalibi=dense.NONE if dalibi is None else dalibi)


@pytest.mark.parametrize("tile", [(16, 16), (16, 64), (64, 32)])
def test_any_tile_sizes(tile: tuple[int, int]) -> None:
    inputs, rule = tensors(70, (2, 1), (16, 16), torch.float32, batch=1), Rule(37, 5)
    got = local(inputs, rule, lambda *_: Config(*tile, 1, 1))
    assert error(got, expected(inputs, rule, None, 0.3, dense.PLAIN)) <= tolerance("fp32")


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
def test_head_dimensions(dim: int) -> None:
    inputs, rule = tensors(40, (2, 1), (dim, dim), torch.float16, batch=1), Rule(None, 0)
    assert error(local(inputs, rule), expected(inputs, rule, None, 0.3, dense.PLAIN)) <= tolerance("fp16")


def test_any_strides() -> None:
    """Heads inside tokens, as a projection leaves them; and a last dimension that is not dense."""
    inputs, rule = tensors(33, (2, 1), (16, 16), torch.float32), Rule(None, 0)
    truth = local(inputs, rule)
    inside = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:4])
    sparse = tuple(torch.stack([x, x], -1)[..., 0] for x in inputs)
    for strange in ((*inside, inputs[4]), sparse):
        assert all(torch.equal(a, b) for a, b in zip(local(strange, rule), truth, strict=True))


def test_logits_of_ten_thousand() -> None:
    """The running maximum is far from zero and moves by far more than exp can hold."""
    q, k, v, dout, dlse = tensors(48, (2, 2), (16, 16), torch.float32)
    scaled = (q / q.norm(dim=-1, keepdim=True) * 3e4, k / k.norm(dim=-1, keepdim=True), v, dout, dlse * 0)
    got, truth = local(scaled, Rule(None, 0)), expected(scaled, Rule(None, 0), None, 0.3, dense.PLAIN)
    assert all(x.isfinite().all() for x in got)
    assert (got.out - truth.out).abs().max() <= 1e4 * tolerance("fp32")


def test_what_is_masked_is_not_computed() -> None:
    """NaN in padding stays there."""
    inputs, rule = tensors(48, (2, 1), (16, 16), torch.float32), Rule(None, None, 29)
    for x in inputs:
        x[:, :, 29:] = math.nan
    got = local(inputs, rule)
    assert all(x[:, :, :29].isfinite().all() for x in got[:5])
    assert all(not x[:, :, 29:].any() for x in (got.out, got.dq, got.dk, got.dv))
    assert bool((got.lse[:, :, 29:] == -math.inf).all())


def test_the_same_every_time() -> None:
    inputs, chosen = tensors(40, (2, 1), (16, 16), torch.float32), in_single(extras.make("alibi+dropout", 2, 2))
    first, second = (local(inputs, Rule(None, 0), given=chosen) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
