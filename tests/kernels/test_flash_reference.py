"""kernels/flash/reference.py, the oracle of every fused kernel, against dense attention written out."""

from __future__ import annotations

import math

import pytest
import torch
from attention import dense

from longctx.attention.scores import Scores
from longctx.kernels.flash import reference

from tolerances import tolerance


class Given:
    """A mask from an explicit (1, 1, Tq, Tk) tensor, which hides how a tile is classified."""

    def __init__(self, allowed: torch.Tensor) -> None:
        self.allowed, self.asked = allowed, 0
        self.q_index, self.k_index = torch.arange(allowed.shape[2]), torch.arange(allowed.shape[3])

    def tile(self, q0: int, q1: int, k0: int, k1: int) -> bool | torch.Tensor:
        self.asked += 1
        tile = self.allowed[..., q0:q1, k0:k1]
        return True if tile.all() else tile if tile.any() else False


def run(inputs: tuple[torch.Tensor, ...], allowed: torch.Tensor, tile: int, blocks: int = 1) -> dense.Results:
    """Forward over `blocks` blocks of keys in turn, then backward likewise."""
    q, k, v, dout, dlse = inputs
    out, lse = torch.zeros_like(dout, dtype=torch.float64), torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    cuts = [slice(int(c[0]), int(c[-1]) + 1) for c in torch.arange(k.shape[2]).chunk(blocks)]
    for cut in cuts:
        reference.forward(q, k[:, :, cut], v[:, :, cut], Given(allowed[..., cut]), Scores(0.3), out, lse, tile)
    delta = (out * dout).sum(-1) - dlse
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for cut in cuts:
        reference.backward(
            dout,
            q,
            k[:, :, cut],
            v[:, :, cut],
            lse,
            delta,
            Given(allowed[..., cut]),
            Scores(0.3),
            dq,
            dk[:, :, cut],
            dv[:, :, cut],
            None,
            tile,
        )
    return dense.Results(out, lse, dq, dk, dv)


def tensors(rows: int, cols: int, heads: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    shapes = (2, heads, rows, 6), (2, kv_heads, cols, 6), (2, kv_heads, cols, 5), (2, heads, rows, 5), (2, heads, rows)
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (7, 5), (16, 33), (40, 40)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("tile", [5, 8, 512])
@pytest.mark.parametrize("blocks", [1, 3])
def test_equals_dense(rows: int, cols: int, heads: int, kv_heads: int, tile: int, blocks: int) -> None:
    """Chunk sizes that do and do not divide the lengths, several blocks in turn, some rows that see nothing."""
    inputs = tensors(rows, cols, heads, kv_heads)
    allowed = torch.rand(1, 1, rows, cols) < 0.5
    allowed[..., 0, :] = False
    truth = dense.attention(*inputs[:3], allowed, 0.3, *inputs[3:])
    assert dense.difference(run(inputs, allowed, tile, blocks), truth) <= tolerance("fp64")


def test_logits_of_ten_thousand() -> None:
    q, k, v, dout, dlse = tensors(9, 20, 2, 2)
    inputs = (q / q.norm(dim=-1, keepdim=True) * 3e4, k / k.norm(dim=-1, keepdim=True), v, dout, dlse)
    allowed = torch.ones(1, 1, 9, 20, dtype=torch.bool)
    truth = dense.attention(*inputs[:3], allowed, 0.3, *inputs[3:])
    for got, true in zip(run(inputs, allowed, 8), truth, strict=True):
        assert (got - true).abs().max() <= tolerance("fp64") * true.abs().max().clamp(min=1)


def test_what_is_masked_is_not_computed() -> None:
    """NaN in keys that nobody sees stays there."""
    inputs = tensors(16, 32, 2, 1)
    allowed = torch.ones(1, 1, 16, 32, dtype=torch.bool)
    allowed[..., 16:] = False
    inputs[1][:, :, 16:] = inputs[2][:, :, 16:] = math.nan
    result = run(inputs, allowed, 8)
    assert all(x.isfinite().all() for x in result)
