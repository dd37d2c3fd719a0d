"""What the attention operators share: inputs, settings, schemas, gradients, and results without values for tracing.

Each operator of torch.library takes (*AttentionInputs, *settings), flat as a schema demands, and returns (out, lse,
...); `unflatten` restores the names. Backward always computes the gradients of all five inputs, so that no rank of a
ring skips a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch

from longctx.attention import sink as sinks
from longctx.attention.backends.base import BackwardQueries, accumulator_dtype
from longctx.attention.backends.choose import choose_backend, pattern_of
from longctx.attention.band import Rule
from longctx.attention.comm import LocalLink, ProcessLink
from longctx.attention.passes import Passes
from longctx.attention.scores import Scores
from longctx.mesh import from_key


class AttentionInputs(NamedTuple):
    """The tensors that have a gradient: q (B, H, Tq, Dk), k (B, G, Tk, Dk), v (B, G, Tk, Dv), sink and alibi (H,)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sink: torch.Tensor | None
    alibi: torch.Tensor | None


class BlockSettings(NamedTuple):
    """All other arguments of `block_attention`, checked. q_documents (B, Tq), k_documents (B, Tk), seeds (B,)."""

    q_documents: torch.Tensor | None
    k_documents: torch.Tensor | None
    seeds: torch.Tensor | None
    q_offset: int
    left: int | None
    right: int | None
    scale: float
    softcap: float | None
    dropout_p: float
    backend: str


class RingSettings(NamedTuple):
    """All other arguments of `ring_attention`, checked. documents (B, T), seeds (B,). An operator takes no Mesh, so
    `mesh` is its key, from which `longctx.mesh.from_key` returns it; "" is a ring of one rank."""

    documents: torch.Tensor | None
    seeds: torch.Tensor | None
    mesh: str
    layout: str
    left: int | None
    right: int | None
    length: int | None
    scale: float
    softcap: float | None
    dropout_p: float
    backend: str


Settings = TypeVar("Settings", BlockSettings, RingSettings)
_SCHEMA = {
    torch.Tensor: "Tensor", torch.Tensor | None: "Tensor?", int: "int", int | None: "int?", float: "float",
    float | None: "float?", str: "str", bool: "bool",
}  # fmt: skip


def schema_of(*groups: type, integer: str = "int") -> str:
    """Return the fields of the groups as arguments of an operator's schema.

    Args:
        integer: "int", or "SymInt": integers may be symbolic under torch.compile, so a new length needs no
            recompilation.
    """
    fields = [(name, _SCHEMA[kind]) for group in groups for name, kind in get_type_hints(group).items()]
    return ", ".join(f"{integer + kind[3:] if kind.startswith('int') else kind} {name}" for name, kind in fields)


def unflatten(arguments: Sequence[Any], kind: type[Settings]) -> tuple[AttentionInputs, Settings]:
    """Return an operator's flat arguments by name."""
    count = len(AttentionInputs._fields)
    return AttentionInputs(*arguments[:count]), kind(*arguments[count:])


def make_scores(q: torch.Tensor, alibi: torch.Tensor | None, settings: BlockSettings | RingSettings) -> Scores:
    """Return how logits and probabilities are computed, with the slopes in the accumulator's dtype."""
    slopes = None if alibi is None else alibi.to(accumulator_dtype(q.dtype))
    return Scores(settings.scale, settings.softcap, slopes, settings.dropout_p, settings.seeds)


def make_passes(q: torch.Tensor, v: torch.Tensor, alibi: torch.Tensor | None, settings: RingSettings) -> Passes:
    """Return the ring's forward and backward pass under these settings."""
    mesh = from_key(settings.mesh) if settings.mesh else None
    link = LocalLink() if mesh is None or mesh.ring_size == 1 else ProcessLink(mesh)
    scores = make_scores(q, alibi, settings)
    rule = Rule(settings.left, settings.right, settings.length)
    backend = choose_backend(settings.backend, q, v, scores, pattern_of(rule, settings.documents))
    return Passes(link, settings.layout, rule, scores, backend)


def per_head(
    queries: BackwardQueries, sink: torch.Tensor | None, alibi: torch.Tensor | None, dalibi: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dsink, dalibi), each (H,) in its input's dtype, or empty without that input: an operator cannot return
    None."""
    dsink = queries.lse.new_empty(0) if sink is None else sinks.gradient(queries, sink).to(sink.dtype)
    slopes = queries.lse.new_empty(0) if alibi is None or dalibi is None else dalibi.to(alibi.dtype, copy=True)
    return dsink, slopes


def fake_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) without values, for tracing."""
    lse = torch.empty(q.shape[:3], dtype=accumulator_dtype(q.dtype), device=q.device)
    return torch.empty((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device), lse


def fake_backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the five inputs without values, each shaped as its input, for tracing."""
    inputs = arguments[: len(AttentionInputs._fields)]
    return tuple(lse.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def register_gradient(forward: Any, backward: Any) -> None:
    """Register autograd for an operator (*inputs, *settings) -> (out, lse).

    backward takes (dout, dlse or None, out, lse, *inputs, *settings) and returns the gradient of every input; what it
    returns for an input that is None is ignored.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.set_materialize_grads(False)  # an unused lse must not cost a gradient
        ctx.save_for_backward(*output, *(x for x in inputs if isinstance(x, torch.Tensor)))
        ctx.others = [None if isinstance(x, torch.Tensor) else (x,) for x in inputs]

    def differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
        out, lse, *tensors = ctx.saved_tensors
        saved = iter(tensors)
        arguments = [next(saved) if x is None else x[0] for x in ctx.others]
        if dout is None:
            dout = torch.zeros_like(out)
        grads = backward(dout, dlse, out, lse, *arguments)
        given = [None if x is None else grad for x, grad in zip(arguments, grads, strict=False)]
        return (*given, *(None for _ in arguments[len(given) :]))

    forward.register_autograd(differentiate, setup_context=save)
