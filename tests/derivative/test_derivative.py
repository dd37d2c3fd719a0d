"""Second derivatives are right or refused, whatever else depends on the same tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bounded import ranks

from longctx import abc_attention, block_attention, cosine_attention, ring_attention
from longctx.attention import simulate
from longctx.attention.comm import Link
from longctx.bounded.abc import control
from longctx.derivative import first_only
from longctx.nn.loss import tiled_loss
from longctx.nn.tokenwise import tiled

from tolerances import tolerance

Call = Callable[[torch.Tensor], torch.Tensor]
REFUSED = ("no second derivative", "no autograd formula")


def tensor(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


K, V, S, M = tensor(1, 1, 2, 8, 4), tensor(2, 1, 2, 8, 3), tensor(3, 1, 2, 8, 3), tensor(4, 2)
OPERATORS: dict[str, Call] = {
    "abc": lambda q: abc_attention(q, K, V, S),
    "abc by its keys": lambda k: abc_attention(K, k, V, S, normalizer="running"),
    "abc by its logits": lambda s: abc_attention(K, K, V, s[..., :3]),
    "abc without causal": lambda q: abc_attention(q, K, V, S, causal=False),
    "abc by keys without causal": lambda k: abc_attention(K, k, V, S, causal=False),
    "window": lambda q: abc_attention(q, K, V, control.window(3)),
    "compressive": lambda q: abc_attention(q, K, V, control.compressive(4, 2)),
    "cosine": lambda q: cosine_attention(q, K, V, M),
    "cosine by keys without causal": lambda k: cosine_attention(K, k, V, M, causal=False),
    "abc by triton": lambda q: abc_attention(*(x.float() for x in (q, K, V, S)), backend="triton").double(),
    "cosine by triton": lambda q: cosine_attention(*(x.float() for x in (q, K, V, M)), backend="triton").double(),
    "block": lambda q: block_attention(q, K, V)[0],
    "ring of one": lambda q: ring_attention(q, K, V),
    "tiles": lambda x: tiled(torch.sin, x.flatten(0, 2), (), 5),
    "tiled loss": lambda x: tiled_loss(x.flatten(0, 2), tensor(5, 7, 4), torch.arange(16) % 7, tile=5),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_right_or_refused(name: str) -> None:
    """The loss also depends on x directly, so a missing part would not be an error of torch's."""
    x, call = tensor(0, 1, 2, 8, 4).requires_grad_(), OPERATORS[name]
    weight = tensor(6, *call(x).shape)

    def penalty(x: torch.Tensor, again: bool) -> torch.Tensor:
        (first,) = torch.autograd.grad((call(x) * weight).sum(), x, create_graph=again)
        return first.square().sum() + x.square().sum()

    try:
        (found,) = torch.autograd.grad(penalty(x, True), x)
    except RuntimeError as error:
        assert any(part in str(error) for part in REFUSED)
        return
    step, size = tensor(7, *x.shape), 1e-5
    near = [penalty((x + sign * size * step).detach().requires_grad_(), False) for sign in (1, -1)]
    expected = float((near[0] - near[1]).detach()) / (2 * size)
    assert float((found * step).sum()) == pytest.approx(expected, rel=tolerance("fp32"))


@first_only
class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dout: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0].detach() * dout  # type: ignore[attr-defined]


def test_first_derivatives_are_given_also_with_create_graph() -> None:
    x = torch.tensor([3.0, -2.0], requires_grad=True)
    for again in (False, True):
        (found,) = torch.autograd.grad(Square.apply(x).sum(), x, create_graph=again)
        assert found.tolist() == [6.0, -4.0]
        assert found.requires_grad == again
    with pytest.raises(RuntimeError, match="Square of longctx has no second derivative"):
        torch.autograd.grad(found.sum() + x.sum(), x)


def test_inputs_are_not_kept() -> None:
    """What ties a gradient to its inputs holds none of their memory."""
    x = torch.zeros(1000, requires_grad=True)
    node = Square.apply(x * 1).grad_fn
    assert [tie.untyped_storage().nbytes() for tie in node.ties] == [0]


def test_a_ring_refuses_too() -> None:
    """States cross ranks as messages, which have no history."""
    parts = ranks.indices("contiguous", 2, 48)

    def worker(link: Link) -> str:
        leaves, weight = ranks.inputs("bidirectional")
        here = parts[link.rank]
        mine = [x[:, :, here].clone().requires_grad_() for x in leaves]
        out = ranks.call("bidirectional", mine, None, "contiguous", link)
        (first,) = torch.autograd.grad((out * weight[:, :, here]).sum(), mine[1], create_graph=True)
        with pytest.raises(RuntimeError, match="|".join(REFUSED)):
            torch.autograd.grad(first.square().sum() + mine[1].sum(), mine[1])
        return "refused"

    assert simulate.run(2, worker)[0] == ["refused", "refused"]
