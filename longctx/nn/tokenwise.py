"""Compute a token-wise function (an MLP) one tile of tokens at a time, forward and backward.

An MLP's intermediate results are several times as wide as its input, and autograd saves them all. `tiled` saves only
the input and recomputes a tile's intermediate results when its gradient is due. All tiles are one autograd node, so
each parameter gets one gradient, the fp32 sum over tiles.

The input is saved by a node of its own, before any work of this function. The recomputation of an activation checkpoint
stops once all saved tensors exist again, so it does not run the function a third time, unless a later part of the layer
needs its output. An input that has another source in backward, such as the norm that computed it, is not saved at all
(`saved.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from longctx.derivative import first_only
from longctx.nn.gated import Gated
from longctx.nn.saved import SavedInput, register_source, save_input


def tiled(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    tile: int,
    *,
    random: bool = False,
    gated: Gated | None = None,
    again: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return ``function(x)``, computed in tiles of tokens, without saving its intermediate results.

    Args:
        function: from (1, n, D) to (1, n, E), each token independently; it reads ``parameters`` when called.
        x: (..., D).
        parameters: everything in ``function`` that may need a gradient.
        tile: tokens per tile.
        random: whether it draws random numbers (dropout); backward draws the same ones.
        gated: the gated MLP that ``function`` is, if it is one; its backward takes less time and memory.
        again: recomputes the output for all tokens, for functions that would otherwise save it; None: they save it.

    Returns:
        (..., E), in ``function``'s dtype. Gradients of ``parameters`` are summed in fp32, fp64 for fp64.
    """
    wanted = tuple(parameter for parameter in parameters if parameter.requires_grad)
    if not torch.is_grad_enabled() or not (x.requires_grad or wanted):
        return in_tiles(function, x, tile)
    saved = SavedInput(again)
    if x.requires_grad:
        x = save_input(x, saved)
    settings = _Settings(function, tile, random, saved, gated)
    out: torch.Tensor = _Tiled.apply(x, settings, *wanted)
    if again is not None and x.requires_grad:
        register_source(out, saved)
    return out


def in_tiles(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tile: int) -> torch.Tensor:
    """Return function(x), computed tile by tile."""
    flat = x.reshape(1, -1, x.shape[-1])
    out: torch.Tensor | None = None
    for first in range(0, flat.shape[1], tile):
        part = function(flat[:, first : first + tile])
        if out is None:
            out = part.new_empty(1, flat.shape[1], part.shape[-1])
        out[:, first : first + tile] = part
    assert out is not None  # transformers has no empty batches
    return out.view(*x.shape[:-1], out.shape[-1])


@dataclass(frozen=True, eq=False)
class _Settings:
    """Arguments of `tiled`, and its input as saved."""

    function: Callable[[torch.Tensor], torch.Tensor]
    tile: int
    random: bool
    saved: SavedInput
    gated: Gated | None


@first_only
class _Tiled(torch.autograd.Function):
    """(x, settings, *parameters) -> function(x). Backward recomputes each tile's forward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, settings: _Settings, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.function, ctx.tile, ctx.parameters = settings.function, settings.tile, parameters
        ctx.gated = None if torch.is_autocast_enabled(x.device.type) else settings.gated
        ctx.saved = settings.saved
        ctx.x = x if settings.saved.node is None else None  # an input without gradient has no node that saves it
        ctx.shape = x.shape
        ctx.random = _Random(x.device) if settings.random else None
        ctx.autocast = _autocast(x.device.type)
        return in_tiles(settings.function, x, settings.tile)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x = ctx.saved.input() if ctx.x is None else ctx.x
        ctx.saved.release()  # before the tiles allocate
        x, dout = x.detach(), dout.reshape(-1, dout.shape[-1])
        flat, of_x = x.reshape(-1, x.shape[-1]), ctx.needs_input_grad[0]
        if ctx.gated is not None:
            dx, totals = ctx.gated.gradients(flat, dout, ctx.tile, ctx.parameters, of_x)
        else:
            dx, totals = _gradients(ctx, flat[None], dout[None], of_x)
        dparameters = (
            None if total is None else total.to(p.dtype) for total, p in zip(totals, ctx.parameters, strict=True)
        )
        return (None if dx is None else dx.view(ctx.shape), None, *dparameters)


def _gradients(
    ctx: Any, x: torch.Tensor, dout: torch.Tensor, of_x: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Compute by autograd the gradients of x (1, N, D), if ``of_x``, and of the parameters, in fp32."""
    dx = torch.empty_like(x) if of_x else None
    totals: list[torch.Tensor | None] = [None] * len(ctx.parameters)
    with ctx.random.again() if ctx.random else contextlib.nullcontext(), ctx.autocast():
        for first in range(0, x.shape[1], ctx.tile):
            part = slice(first, first + ctx.tile)
            grad = _accumulate(ctx, x[:, part], dout[:, part], totals, of_x)
            if dx is not None and grad is not None:
                dx[:, part] = grad
    return dx, totals


def _accumulate(
    ctx: Any, x: torch.Tensor, dout: torch.Tensor, totals: list[torch.Tensor | None], of_x: bool
) -> torch.Tensor | None:
    """Add one tile's gradients of the parameters to ``totals`` and return x's, if ``of_x``.

    A hook takes each parameter's gradient as soon as it is computed and returns an expanded zero, which needs no
    memory. So only one parameter's gradient exists beside the sums at a time. Nothing reaches a parameter's ``.grad``.
    """

    def take(index: int, grad: torch.Tensor) -> torch.Tensor:
        totals[index] = _added(totals[index], grad)
        return grad.new_zeros(()).expand(grad.shape)

    x = x.detach().requires_grad_(of_x)
    with torch.enable_grad():
        out = ctx.function(x)
    hooks = [parameter.register_hook(partial(take, index)) for index, parameter in enumerate(ctx.parameters)]
    try:
        inputs = [x, *ctx.parameters] if of_x else list(ctx.parameters)
        grads = torch.autograd.grad(out, inputs, dout, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return grads[0] if of_x else None


def _added(total: torch.Tensor | None, grad: torch.Tensor) -> torch.Tensor:
    if total is None:  # copy: autograd may use the same storage for another gradient
        return grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
    return total.add_(grad)


def _autocast(device: str) -> Callable[[], Any]:
    """Return a function that re-enters the current autocast: backward runs outside of it."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)


class _Random:
    """The random generators' states at a forward, to repeat it."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.host = torch.get_rng_state()
        self.states = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.host)
            for device, state in zip(self.devices, self.states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
