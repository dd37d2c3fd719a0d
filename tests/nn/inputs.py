"""What tests of token-wise functions share: a function whose output backward recomputes, and sums over many tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

from longctx.nn.tokenwise import in_tiles, tiled

from tolerances import tolerance

WIDTH, OUT = 24, 40


def squash(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * 1.5


def recomputed(x: torch.Tensor) -> torch.Tensor:
    """Return squash(x), which a linear finds again in backward instead of saving it."""
    return tiled(squash, x, [], 5, again=lambda x: in_tiles(squash, x, 5))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return x (2, 9, 24) and three weights (40, 24)."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 9, WIDTH, generator=generator).to(dtype).requires_grad_()
    weights = [torch.randn(OUT, WIDTH, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    return x, weights


def check_bf16_gradients(
    make: Callable[[torch.dtype], torch.nn.Module],
    compute: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor],
) -> None:
    """Assert that gradients of bf16 weights, summed over 4096 tokens, are rounded to bf16 once."""
    torch.manual_seed(0)
    mlp, exact = make(torch.bfloat16), make(torch.float64)
    exact.load_state_dict(mlp.state_dict())
    x = torch.randn(1, 4096, 8, dtype=torch.bfloat16)
    out = compute(mlp, x)
    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(exact(x.double()), list(exact.parameters()), dout.double())
    for ours, truth in zip(torch.autograd.grad(out, list(mlp.parameters()), dout), wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - truth).norm() <= tolerance("bf16 result") * truth.norm()
