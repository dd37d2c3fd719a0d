"""Attention to a tensor that is keys and values, tile by tile, against one dense softmax in fp64."""

from __future__ import annotations

import pytest
import torch
from decode.test_el import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.decode.shared import shared_attention
from longctx.errors import AttentionError

F64 = torch.float64


@settings(max_examples=20)
@given(
    keys=st.integers(0, 12), tile=st.integers(1, 13), values=st.sampled_from([None, 1, 4]), sunk=st.booleans(),
    dropped=st.booleans(), hidden=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_one_dense_softmax(
    keys: int, tile: int, values: int | None, sunk: bool, dropped: bool, hidden: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    q, shared = torch.randn(2, 3, 2, 5, dtype=F64), torch.randn(2, keys, 5, dtype=F64)
    sink = torch.randn(3, dtype=F64) if sunk else None
    factor = torch.rand(2, 3, 2, keys, dtype=F64) if dropped else torch.ones(2, 3, 2, keys, dtype=F64)
    visible = torch.rand(2, 3, 2, keys) < (0.5 if hidden else 2)
    visible[0] &= not hidden  # a row of the batch that sees nothing
    found = shared_attention(
        q, shared, value_width=values, sink=sink, tile=tile,
        edit=lambda s, a, b: s.masked_fill(~visible[..., a:b], -torch.inf), keep=lambda p, a, b: p * factor[..., a:b],
    )  # fmt: skip
    s = (q @ shared[:, None].mT).masked_fill(~visible, -torch.inf)
    column = torch.full((2, 3, 2, 1), -torch.inf, dtype=F64) if sink is None else sink[:, None, None].expand(2, 3, 2, 1)
    s = torch.cat((s, column), -1)
    p = torch.softmax(s, -1).nan_to_num(0.0)[..., :keys] * factor
    assert_equal(found.context, p @ shared[:, None, :, :values])
    assert_equal(found.lse, torch.logsumexp(s, -1))
    assert_equal(found.mass, p.sum(-1))


def test_gradients_are_those_of_one_softmax() -> None:
    q, shared = (torch.randn(*shape, dtype=F64, requires_grad=True) for shape in ((1, 2, 2, 4), (1, 7, 4)))
    sink = torch.randn(2, dtype=F64, requires_grad=True)
    s = torch.cat((q @ shared[:, None].mT, sink[:, None, None].expand(1, 2, 2, 1)), -1)
    truth = torch.softmax(s, -1)[..., :7] @ shared[:, None]
    grad = torch.randn_like(truth)
    found = shared_attention(q, shared, sink=sink, tile=3).context
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, shared, sink), grad),
        torch.autograd.grad(truth, (q, shared, sink), grad),
        strict=True,
    ):
        assert_equal(ours, theirs)


def test_large_logits_do_not_overflow() -> None:
    q, shared = torch.full((1, 1, 1, 1), 1000.0), torch.tensor([[[-2.0], [1.0], [2.0]]])
    found = shared_attention(q, shared, tile=1)
    assert found.context.item() == 2.0 and found.lse.item() == 2000.0 and found.mass.item() == 1.0


def test_what_does_not_fit_is_refused() -> None:
    q, shared = torch.ones(1, 2, 1, 4), torch.ones(1, 3, 4)
    for message, options in (
        (r"expected q \(B, H, T, C\)", {"shared": shared[..., :3]}),
        ("one dtype and one device", {"shared": shared.double()}),
        ("values are columns of shared, 1 to 4", {"value_width": 5}),
        (r"expected one logit per head, \(2,\)", {"sink": torch.ones(3)}),
    ):
        with pytest.raises(AttentionError, match=message):
            shared_attention(**({"q": q, "shared": shared} | options))  # type: ignore[arg-type]
