"""How the CPU backend initialises accumulators and shares key heads; test_block.py has its results."""

from __future__ import annotations

import pytest
import torch
from attention import dense

from longctx.attention.backends.aten import AtenBackend, Written
from longctx.attention.backends.base import BackwardQueries, KeyBlock, StepGradients
from longctx.attention.band import make_rule
from longctx.attention.mask import BlockMask
from longctx.attention.scores import Scores
from longctx.layout import Span

from tolerances import tolerance


def test_rows_are_overwritten_once_and_skipped_rows_are_filled() -> None:
    target = torch.full((2, 1, 6), torch.nan)
    written = Written(2, 6, (target, 0.0))
    assert written.first_write(slice(0, 2), 1, 3)  # row 0 is skipped, so filled; rows 1 and 2 are the caller's
    target[:, :, 1:3] = 7.0
    assert not written.first_write(slice(0, 1), 2, 4), "row 2 holds something, so all are added to"
    assert target[0, 0, :4].tolist() == [0.0, 7.0, 7.0, 0.0]
    written.finish()
    assert not bool(target.isnan().any()) and target[1, 0, 3:].tolist() == [0.0] * 3
    again = Written(2, 6, (target, -1.0))
    again.all()
    assert not again.first_write(slice(0, 2), 0, 6)
    again.finish()
    assert bool((target >= 0).all())


@pytest.mark.parametrize("first", [True, False])
def test_a_step_starts_or_continues_a_result(first: bool) -> None:
    """Two steps equal dense attention over both blocks, whatever uninitialised memory holds."""
    g, index = torch.Generator().manual_seed(0), torch.arange(16)
    q, dout = (torch.randn(1, 4, 16, 8, generator=g, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(1, 2, 16, 8, generator=g, dtype=torch.float64) for _ in range(2))
    rule = make_rule(True, None)
    truth = dense.attention(q, k, v, dense.visible(index, index, rule), 0.5, dout)
    halves = [(slice(0, 8), Span(0, 8)), (slice(8, 16), Span(8, 8))][:: 1 if first else -1]
    blocks = [KeyBlock(k[:, :, at], v[:, :, at], BlockMask((Span(0, 16),), (span,), rule), Scores(0.5))
              for at, span in halves]  # fmt: skip
    backend, (out, lse) = AtenBackend(), (torch.full((1, 4, 16, 8), torch.nan).double(), torch.empty(1, 4, 16).double())
    for turn, block in enumerate(blocks):
        backend.forward_step(q, block, out, lse, turn == 0)
    torch.testing.assert_close(lse, truth.lse)
    assert (out - truth.out).abs().max() <= tolerance("fp64")
    prepared = backend.prepare_backward(BackwardQueries(q, out, lse, dout, None))
    dq = torch.full_like(q, torch.nan)
    for turn, (block, (at, _)) in enumerate(zip(blocks, halves, strict=True)):
        dk, dv = (torch.full_like(x, torch.nan) for x in (block.k, block.v))
        backend.backward_step(prepared, block, StepGradients(dq, dk, dv, None), turn == 0)
        assert (dk - truth.dk[:, :, at]).abs().max() <= tolerance("fp64")
        assert (dv - truth.dv[:, :, at]).abs().max() <= tolerance("fp64")
    assert (dq - truth.dq).abs().max() <= tolerance("fp64")
