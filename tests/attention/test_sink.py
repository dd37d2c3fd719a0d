"""A sink is a key of value 0: the running result that it starts, and its gradient against autograd."""

from __future__ import annotations

import torch

from longctx.attention import sink as sinks
from longctx.attention.backends.base import BackwardQueries


def test_the_running_result_starts_with_the_sink() -> None:
    q, v, sink = torch.empty(2, 3, 4, 5, dtype=torch.bfloat16), torch.empty(2, 1, 6, 7), torch.tensor([0.5, -1.0, 2.0])
    out, lse, first = sinks.begin(q, v, sink)
    assert not first and out.shape == (2, 3, 4, 7) and out.dtype == lse.dtype == torch.float32
    assert torch.equal(out, torch.zeros_like(out)) and torch.equal(lse, sink[:, None].expand(2, 3, 4))
    out, lse, first = sinks.begin(q.double(), v, None)
    assert first and out.shape == (2, 3, 4, 7) and out.dtype == lse.dtype == torch.float64


def test_the_gradient_is_that_of_a_key_of_value_0() -> None:
    g = torch.Generator().manual_seed(0)
    logits, v, dout, dlse = (torch.randn(1, 2, 3, n, generator=g, dtype=torch.float64) for n in (4, 4, 4, 1))
    v, sink = v[:, :, :1].transpose(2, 3), torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    dout, dlse = dout[..., :1], dlse[..., 0]
    joined = torch.cat([logits, sink[:, None, None].expand(1, 2, 3, 1)], -1)
    out, lse = joined.softmax(-1)[..., :4] @ v, joined.logsumexp(-1)
    (expected,) = torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), sink)
    rows = BackwardQueries(logits, out.detach(), lse.detach(), dout, dlse)
    torch.testing.assert_close(sinks.gradient(rows, sink.detach()), expected)


def test_a_row_that_sees_nothing_contributes_0() -> None:
    zero, nothing = torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -torch.inf)
    assert sinks.gradient(BackwardQueries(zero, zero, nothing, zero + 1, None), torch.tensor([-torch.inf])) == 0
