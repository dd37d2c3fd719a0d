"""Outputs that backward recomputes: saved nowhere, recomputed once, and never taken for another tensor."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn.inputs import OUT, WIDTH, inputs, recomputed, squash

from longctx.nn.linear import linear
from longctx.nn.saved import find_source
from longctx.nn.tokenwise import in_tiles, tiled


def saved_bytes(function: Any) -> int:
    """Return the bytes that autograd saves, weights left out."""
    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        function()
    return sum(t.nbytes for t in {t.data_ptr(): t for t in held if t.numel() != OUT * WIDTH}.values())


def test_neither_the_output_nor_a_copy_is_saved() -> None:
    x, weights = inputs()

    def run(multiply: Any) -> Any:
        h = recomputed(x)
        return sum(multiply(h, w, None) for w in weights)

    assert saved_bytes(lambda: run(F.linear)) == 2 * x.nbytes
    assert saved_bytes(lambda: run(linear)) == x.nbytes
    assert saved_bytes(lambda: tiled(squash, recomputed(x), [], 5)) == x.nbytes


def test_it_is_recomputed_once_for_all_users_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = inputs()
    calls: list[int] = []
    h = tiled(squash, x, [], 5, again=lambda x: calls.append(1) or in_tiles(squash, x, 5))  # type: ignore[func-returns-value]
    source: Any = find_source(h)
    out = sum(linear(h, w, None) for w in weights).sum()
    for again in range(2):
        torch.autograd.grad(out, [x, *weights], retain_graph=True)
        assert len(calls) == again + 1
        assert source._result is None and source._input is None


def test_only_the_whole_and_unchanged_output_is_found() -> None:
    x, _ = inputs()
    h = recomputed(x)
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


def test_a_freed_output_is_not_found_at_its_address() -> None:
    """A tensor is recognised by its storage, not by its address, which malloc may reuse."""
    x, _ = inputs()
    h = recomputed(x)
    place, shape = h.data_ptr(), h.shape
    assert find_source(h) is not None
    del h
    bytes_there = (ctypes.c_float * shape.numel()).from_address(place)  # not read or written
    other = torch.frombuffer(bytes_there, dtype=torch.float32).view(shape).requires_grad_()
    assert other.data_ptr() == place and other.is_contiguous()
    assert find_source(other) is None


def test_frozen_weights_recompute_nothing() -> None:
    x, weights = inputs()
    h = tiled(squash, x, [], 5, again=lambda x: pytest.fail("recomputed, but no weight has a gradient"))
    linear(h, weights[0].detach(), None).sum().backward()
    assert x.grad is not None
