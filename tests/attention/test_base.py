"""What all backends share: the accumulator's dtype and delta."""

from __future__ import annotations

import pytest
import torch

from longctx.attention.backends.base import BackwardQueries, accumulator_dtype, delta_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_are_summed_in_fp32_or_better(dtype: torch.dtype) -> None:
    assert accumulator_dtype(dtype) == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("with_dlse", [False, True])
def test_delta_is_the_row_sum_of_the_softmax_gradient(with_dlse: bool) -> None:
    """dS = P * (dP - delta), by autograd: delta = P . dP - dLSE."""
    g = torch.Generator().manual_seed(0)
    s, v, dout = (torch.randn(1, 2, 3, n, generator=g, dtype=torch.float64) for n in (3, 5, 5))
    dlse = torch.randn(1, 2, 3, generator=g, dtype=torch.float64) if with_dlse else None
    s.requires_grad_()
    p, lse = s.softmax(-1), s.logsumexp(-1)
    out = p @ v
    objective = (out * dout).sum() + (0 if dlse is None else (lse * dlse).sum())
    (ds,) = torch.autograd.grad(objective, s)
    delta = delta_of(BackwardQueries(s, out.detach(), lse.detach(), dout, dlse))
    torch.testing.assert_close(p * (dout @ v.mT - delta[..., None]), ds)
