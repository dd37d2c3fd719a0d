"""Results that backward makes anew: gradients are as ever, whoever asks, and nobody is given what is not his."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from longctx.nn.linear import linear
from longctx.nn.saved import find_source
from longctx.nn.tokenwise import in_tiles, tiled

WIDTH, OUT = 24, 40


def squash(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * 1.5


def remade(x: torch.Tensor) -> torch.Tensor:
    return tiled(squash, x, [], 5, again=lambda x: in_tiles(squash, x, 5))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 9, WIDTH, generator=generator).to(dtype).requires_grad_()
    weights = [torch.randn(OUT, WIDTH, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    return x, weights


def kept_bytes(function: Any) -> int:
    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        function()
    return sum(t.nbytes for t in {t.data_ptr(): t for t in held if t.numel() != OUT * WIDTH}.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_linears_are_their_own(dtype: torch.dtype, bias: bool, checkpointed: bool) -> None:
    x, weights = inputs(dtype)
    b = torch.randn(OUT, dtype=dtype, requires_grad=True) if bias else None
    wanted_of = [x, *weights, *([] if b is None else [b])]

    def run(make: Any, multiply: Any) -> list[torch.Tensor]:
        def layer(x: torch.Tensor) -> torch.Tensor:
            h = make(x)
            return sum(torch.sin(multiply(h, w, b)) for w in weights)  # type: ignore[return-value]

        out = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        return list(torch.autograd.grad(out.square().sum(), wanted_of))

    assert all(torch.equal(got, wanted) for got, wanted in zip(run(remade, linear), run(squash, F.linear), strict=True))


def test_neither_the_result_nor_a_copy_is_kept() -> None:
    x, weights = inputs()

    def run(multiply: Any) -> Any:
        h = remade(x)
        return sum(multiply(h, w, None) for w in weights)

    assert kept_bytes(lambda: run(F.linear)) == 2 * x.nbytes
    assert kept_bytes(lambda: run(linear)) == x.nbytes
    assert kept_bytes(lambda: tiled(squash, remade(x), [], 5)) == x.nbytes


def test_it_is_made_once_for_all_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = inputs()
    calls: list[int] = []
    h = tiled(squash, x, [], 5, again=lambda x: calls.append(1) or in_tiles(squash, x, 5))  # type: ignore[func-returns-value]
    kept: Any = find_source(h)
    out = sum(linear(h, w, None) for w in weights).sum()
    for again in range(2):
        torch.autograd.grad(out, [x, *weights], retain_graph=True)
        assert len(calls) == again + 1
        assert kept._result is None and kept._input is None


def test_only_the_whole_and_unchanged_result_is_known() -> None:
    x, _ = inputs()
    h = remade(x)
    assert (
        find_source(h) is not None
        and find_source(h.view(-1, WIDTH)) is find_source(h)
        and find_source(h.view_as(h)) is find_source(h)
    )
    assert find_source(h[:1]) is None and find_source(h.transpose(0, 1)) is None and find_source(h + 0) is None
    assert find_source(h.detach()) is None
    with torch.no_grad():
        assert find_source(h) is None
    with torch.autocast("cpu"):
        assert find_source(h) is None
        assert linear(h, torch.randn(OUT, WIDTH), None).dtype == torch.bfloat16
    with torch.no_grad():
        h.mul_(2)
    assert find_source(h) is None


def test_a_result_whose_memory_others_have_now_is_forgotten() -> None:
    """A tensor is known by its storage, not by its address, which malloc gives to the next that asks."""
    x, _ = inputs()
    h = remade(x)
    place, shape = h.data_ptr(), h.shape
    assert find_source(h) is not None
    del h
    bytes_there = (ctypes.c_float * shape.numel()).from_address(place)  # nobody reads or writes them
    other = torch.frombuffer(bytes_there, dtype=torch.float32).view(shape).requires_grad_()
    assert other.data_ptr() == place and other.is_contiguous()
    assert find_source(other) is None


def test_frozen_weights_have_nothing_made() -> None:
    x, weights = inputs()
    h = tiled(squash, x, [], 5, again=lambda x: pytest.fail("nobody needs it"))
    linear(h, weights[0].detach(), None).sum().backward()
    assert x.grad is not None
