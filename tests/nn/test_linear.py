"""A linear whose input backward recomputes has F.linear's gradients, and products add up in the sum's dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn.inputs import OUT, inputs, recomputed, squash
from torch.utils.checkpoint import checkpoint

from longctx.nn.linear import add_product, linear

from tolerances import tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_equal_those_of_a_saved_input(dtype: torch.dtype, bias: bool, checkpointed: bool) -> None:
    x, weights = inputs(dtype)
    b = torch.randn(OUT, dtype=dtype, requires_grad=True) if bias else None
    wanted_of = [x, *weights, *([] if b is None else [b])]

    def run(make: Any, multiply: Any) -> list[torch.Tensor]:
        def layer(x: torch.Tensor) -> torch.Tensor:
            h = make(x)
            return sum(torch.sin(multiply(h, w, b)) for w in weights)  # type: ignore[return-value]

        out = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        return list(torch.autograd.grad(out.square().sum(), wanted_of))

    assert all(
        torch.equal(got, wanted) for got, wanted in zip(run(recomputed, linear), run(squash, F.linear), strict=True)
    )


def test_an_input_without_a_source_is_plain() -> None:
    x, weights = inputs()
    out = linear(x, weights[0], None)
    plain = F.linear(x, weights[0])
    assert out.equal(plain) and type(out.grad_fn) is type(plain.grad_fn)


@pytest.mark.parametrize(("total", "factors"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)])
def test_products_are_added_in_the_dtype_of_the_sum(total: torch.dtype, factors: torch.dtype) -> None:
    """10,000 rows: more than are added at a time where the dtypes differ."""
    sums, dout, x = torch.randn(10_000, 3).to(total), torch.randn(7, 10_000).to(factors), torch.randn(7, 3).to(factors)
    expected = sums.double() + dout.double().T @ x.double()
    add_product(sums, dout, x)
    allowed = tolerance("bf16 result" if factors == torch.bfloat16 else "fp64") * expected.abs().max()
    assert sums.dtype == total and (sums - expected).abs().max() <= allowed
