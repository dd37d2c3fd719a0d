"""Refuse gradients of gradients where a torch.autograd.Function computes its first derivative alone.

`torch.autograd.function.once_differentiable` does so only if the incoming gradient has a history, and only where the
second backward visits it. With `torch.autograd.grad(loss, x, create_graph=True)` neither holds: the first derivative
would be taken for a constant, and whatever else depends on x would hide that a part of the second one is missing.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

Function = type[torch.autograd.Function]


def first_only(function: Function) -> Function:
    """Decorate a torch.autograd.Function whose backward is no function of autograd.

    With `create_graph=True` its gradients are right, and depend on its inputs by a node that raises RuntimeError as
    soon as a second derivative is computed.
    """
    forward, backward = function.forward, function.backward

    @wraps(forward)
    def remembering(ctx: Any, *inputs: Any) -> Any:
        ctx.ties = () if torch.compiler.is_compiling() else _ties(ctx, inputs)
        return forward(ctx, *inputs)

    @wraps(backward)
    def once(ctx: Any, *gradients: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        listed = found if isinstance(found, tuple) else (found,)
        arrived = [x for x in gradients if isinstance(x, torch.Tensor) and x.requires_grad]
        return _Refuse.apply(function.__name__, len(listed), *listed, *ctx.ties, *arrived)

    function.forward, function.backward = staticmethod(remembering), staticmethod(once)  # type: ignore[method-assign]
    return function


def _ties(ctx: Any, inputs: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """Empty tensors that depend on the inputs and keep nothing of their memory."""
    with torch.enable_grad():
        needed = (x for x, need in zip(inputs, ctx.needs_input_grad, strict=True) if need)
        return tuple(x.as_strided((0,), (1,)).clone() for x in needed)


class _Refuse(torch.autograd.Function):
    """(name, n, n gradients or None, whatever they depend on) -> the gradients."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *given: Any) -> Any:
        ctx.name = name
        found = tuple(None if x is None else x.view_as(x) for x in given[:count])
        return found if count > 1 else found[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name.strip('_')} of longctx has no second derivative, only a first one. Leave out "
            "create_graph=True, or compute this part with operators of torch"
        )
