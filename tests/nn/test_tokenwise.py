"""tiled() equals the function without tiles, forward and backward, and saves only its input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nn.inputs import check_bf16_gradients
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import peak_bytes
from longctx.nn.tokenwise import tiled

from tolerances import tolerance


class Gated(torch.nn.Module):
    """A gated MLP that counts its tokens, in total and in the largest call."""

    def __init__(self, width: int, inner: int, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(width, inner, dtype=dtype)
        self.up = torch.nn.Linear(width, inner, bias=False, dtype=dtype)
        self.down = torch.nn.Linear(inner, width + 1, dtype=dtype)
        self.dropout = torch.nn.Dropout(dropout)
        self.seen = self.largest = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[:-1].numel()
        self.seen, self.largest = self.seen + tokens, max(self.largest, tokens)
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))


def gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    weights = 1 + 0.5 * torch.arange(out.numel(), dtype=torch.float64).reshape(out.shape).cos()
    return torch.autograd.grad((out * weights.to(out.dtype)).sum(), inputs, allow_unused=True)


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3), width=st.integers(1, 6), inner=st.integers(1, 9),
    tile=st.integers(1, 40), seed=st.integers(0, 2**16), frozen=st.sampled_from(["", "x", "up", "all weights"]),
)  # fmt: skip
def test_equals_the_function_without_tiles(
    shape: list[int], width: int, inner: int, tile: int, seed: int, frozen: str
) -> None:
    torch.manual_seed(seed)
    mlp = Gated(width, inner)
    x = torch.randn(*shape, width, dtype=torch.float64, requires_grad=frozen != "x")
    if frozen == "up":
        mlp.up.requires_grad_(False)
    if frozen == "all weights":
        mlp.requires_grad_(False)
    inputs = [t for t in (x, *mlp.parameters()) if t.requires_grad]
    truth, ours = mlp(x), tiled(mlp, x, list(mlp.parameters()), tile)
    torch.testing.assert_close(ours, truth, rtol=tolerance("fp64"), atol=tolerance("fp64"))
    for got, wanted in zip(gradients(ours, inputs), gradients(truth, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance("fp64"), atol=tolerance("fp64"))


def test_no_more_than_a_tile_at_once_and_each_token_twice() -> None:
    mlp, x = Gated(4, 6), torch.randn(3, 50, 4, dtype=torch.float64, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        out = tiled(mlp, x, list(mlp.parameters()), 16)
    assert kept == [x.numel()]
    out.sum().backward()
    assert (mlp.seen, mlp.largest) == (2 * 150, 16)


def test_only_one_weights_gradient_exists_beside_the_sums() -> None:
    mlp, x = Gated(64, 256, dtype=torch.float32), torch.randn(1, 512, 64, requires_grad=True)
    dout, weight = torch.randn(1, 512, 65), 64 * 256 * 4
    kept = dout.nbytes + x.nbytes + sum(p.nbytes for p in mlp.parameters())  # the result and all gradients

    def both() -> None:
        torch.autograd.grad(tiled(mlp, x, list(mlp.parameters()), 4), [x, *mlp.parameters()], dout)

    assert kept + weight <= peak_bytes(both) < kept + 2 * weight


def test_gradients_that_share_storage_are_summed_separately() -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (torch.nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (self.one + self.two)

    module, x = Shared(), torch.randn(1, 11, 3, dtype=torch.float64)
    wanted = gradients(module(x), list(module.parameters()))
    got = gradients(tiled(module, x, list(module.parameters()), 4), list(module.parameters()))
    for ours, truth in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, truth, rtol=tolerance("fp64"), atol=tolerance("fp64"))


def test_a_checkpoint_does_not_run_it_a_third_time() -> None:
    mlp, x = Gated(4, 6), torch.randn(1, 50, 4, dtype=torch.float64, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return x.sin().sum(-1, keepdim=True) + tiled(mlp, x.cos(), list(mlp.parameters()), 16)

    wanted = gradients(layer(x), [x, *mlp.parameters()])
    mlp.seen = 0
    got = gradients(checkpoint(layer, x, use_reentrant=False), [x, *mlp.parameters()])
    assert mlp.seen == 2 * 50
    for ours, truth in zip(got, wanted, strict=True):
        assert torch.equal(ours, truth)


@pytest.mark.parametrize("random", [True, False])
def test_backward_repeats_dropout(random: bool) -> None:
    mlp, x = Gated(4, 6, dropout=0.5), torch.ones(1, 40, 4, dtype=torch.float64, requires_grad=True)
    out = tiled(mlp, x, list(mlp.parameters()), 7, random=random)
    dropped = (out == 0)[0]
    torch.rand(5)  # advance the generator before backward
    state = torch.get_rng_state()
    out.sum().backward()
    expected = ((~dropped).sum(0) * 2.0).to(torch.float64)
    assert torch.equal(mlp.down.bias.grad, expected) == random
    assert torch.equal(torch.get_rng_state(), state) == random


def test_without_gradients_nothing_is_saved() -> None:
    mlp, x = Gated(4, 6), torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        assert not tiled(mlp, x, list(mlp.parameters()), 4).requires_grad
    mlp.requires_grad_(False)
    assert not tiled(mlp, x.detach(), list(mlp.parameters()), 4).requires_grad


def test_bf16_weights_get_sums_in_fp32() -> None:
    check_bf16_gradients(
        lambda dtype: Gated(8, 16, dtype=dtype), lambda mlp, x: tiled(mlp, x, list(mlp.parameters()), 8)
    )


def test_backward_uses_the_autocast_of_forward() -> None:
    mlp, x = Gated(4, 6, dtype=torch.float32), torch.randn(1, 20, 4, requires_grad=True)
    results: list[Any] = []
    for compute in (mlp, lambda x: tiled(mlp, x, list(mlp.parameters()), 6)):
        with torch.autocast("cpu", torch.bfloat16):
            out = compute(x)
        assert out.dtype == torch.bfloat16
        results.append(gradients(out.float(), [x, *mlp.parameters()]))
    for ours, truth in zip(results[1], results[0], strict=True):
        assert (ours - truth).norm() <= tolerance("bf16 result") * truth.norm()
