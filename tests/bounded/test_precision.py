"""Precision of bounded states: half-precision inputs with fp32 states, and a million tokens without drift."""

from __future__ import annotations

import pytest
import torch
from bounded import direct

from longctx.bounded.abc.operator import abc_attention
from longctx.bounded.cosine.operator import cosine_attention

from tolerances import tolerance

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LENGTHS = [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)]


def inputs(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 150, 5), (2, 2, 150, 5), (2, 2, 150, 3), (2, 2, 150, 4) if name == "abc" else (4,)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["abc", "cosine"])
def test_inputs_in_half_precision(name: str, dtype: torch.dtype) -> None:
    attend = abc_attention if name == "abc" else cosine_attention
    narrow = inputs(name, dtype)
    exact = [x.detach().double().requires_grad_() for x in narrow]
    ours, expected = attend(*narrow), attend(*exact)
    assert ours.dtype == dtype
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = [ours.detach(), *torch.autograd.grad(ours, narrow, weight)]
    wanted = [expected.detach(), *torch.autograd.grad(expected, exact, weight.double())]
    allowed = tolerance("fp32") if dtype == torch.float32 else tolerance("bf16 result")
    for a, b in zip(found, wanted, strict=True):
        assert float((a.double() - b).abs().max()) <= allowed * float(b.abs().max())


@pytest.mark.parametrize("length", LENGTHS)
def test_abc_does_not_drift(length: int) -> None:
    """bf16 inputs, state in fp32: the error against fp64 does not grow with the length."""
    g = torch.Generator().manual_seed(1)
    errors, state, exact = [], None, None
    for _ in range(length // 10_000):
        q, k, v = (torch.randn(1, 1, 10_000, 8, generator=g).bfloat16() for _ in range(3))
        s = torch.randn(1, 1, 10_000, 4, generator=g).bfloat16()
        _, state = abc_attention(q, k, v, s, state=state, return_state=True)
        _, exact = abc_attention(*(x.double() for x in (q, k, v, s)), state=exact, return_state=True)
        assert state.keys.dtype == torch.float32
        errors.append(max(direct.differences([state.keys.double(), state.values.double()], [exact.keys, exact.values])))
    assert max(errors) <= tolerance("fp32")


@pytest.mark.parametrize("length", LENGTHS)
def test_cosine_does_not_drift(length: int) -> None:
    """As above, for Cottention."""
    g = torch.Generator().manual_seed(1)
    errors, state, exact, m = [], None, None, torch.full((1,), 0.5)
    for _ in range(length // 10_000):
        q, k, v = (torch.randn(1, 1, 10_000, 8, generator=g).bfloat16() for _ in range(3))
        _, state = cosine_attention(q, k, v, m, state=state, return_state=True)
        _, exact = cosine_attention(*(x.double() for x in (q, k, v)), m.double(), state=exact, return_state=True)
        assert state.memory.dtype == torch.float32
        errors.append(direct.differences([state.memory.double()], [exact.memory])[0] / float(exact.memory.abs().max()))
    assert max(errors) <= tolerance("fp32")
