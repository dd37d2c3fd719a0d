"""What the two attention operators, one device's and the ring's, share: inputs, gradients, shapes for tracing.

Both are (q, k, v, sink, alibi, *settings) -> (out, lse) in torch.library. Their backward always computes the gradients
of all five inputs, so that no rank of a ring leaves it early.
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.attention import sink as sinks
from longctx.attention.backends.base import Rows, accumulator_dtype
from longctx.attention.scores import Scores

INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor? alibi"
"""The arguments that have a gradient, as a schema writes them; the rest are settings."""
_COUNT = INPUTS.count(",") + 1


def make_scores(
    q: torch.Tensor,
    scale: float,
    softcap: float | None,
    alibi: torch.Tensor | None,
    dropout_p: float,
    seeds: torch.Tensor | None,
) -> Scores:
    """An operator's arguments as Scores, slopes in the accumulator's dtype."""
    slopes = None if alibi is None else alibi.to(accumulator_dtype(q.dtype))
    return Scores(scale, softcap, slopes, dropout_p, seeds)


def per_head(
    rows: Rows, sink: torch.Tensor | None, alibi: torch.Tensor | None, dalibi: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dsink, dalibi), (H,) each in its input's dtype; empty where there is none, for an operator returns tensors."""
    dsink = rows.lse.new_empty(0) if sink is None else sinks.gradient(rows, sink).to(sink.dtype)
    slopes = rows.lse.new_empty(0) if alibi is None or dalibi is None else dalibi.to(alibi.dtype, copy=True)
    return dsink, slopes


def fake_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as an attention operator returns them, without values: for tracing."""
    lse = torch.empty(q.shape[:3], dtype=accumulator_dtype(q.dtype), device=q.device)
    return torch.empty((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device), lse


def fake_backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, *inputs: Any
) -> tuple[torch.Tensor, ...]:
    """The gradients of the five inputs without values: for tracing."""
    return tuple(lse.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:_COUNT])


def register_gradient(forward: Any, backward: Any) -> None:
    """Autograd for an operator (*inputs, *settings) -> (out, lse) whose backward takes (dout, dlse or None, out, lse,
    *inputs, *settings) and returns the gradient of every input, whatever it is where the input is None."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.set_materialize_grads(False)  # an unused lse must not cost a gradient
        ctx.save_for_backward(*output, *(x for x in inputs if isinstance(x, torch.Tensor)))
        ctx.others = [None if isinstance(x, torch.Tensor) else (x,) for x in inputs]

    def differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
        out, lse, *tensors = ctx.saved_tensors
        saved = iter(tensors)
        inputs = [next(saved) if x is None else x[0] for x in ctx.others]
        if dout is None:
            dout = torch.zeros_like(out)
        grads = backward(dout, dlse, out, lse, *inputs)
        given = (None if x is None else grad for x, grad in zip(inputs[:_COUNT], grads, strict=True))
        return (*given, *(None for _ in inputs[_COUNT:]))

    forward.register_autograd(differentiate, setup_context=save)
