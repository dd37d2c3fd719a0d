"""The operator of a mesh with ulysses > 1: DeepSpeed Ulysses (2309.14509) within groups of ranks, a ring across them.

`passes.py` has the computation; masks, layouts and backends are the ring's. Forward sends q, k, v in one all-to-all and
out in another; backward sends dout in one and the gradients in another.

Forward saves for backward what the all-to-all delivered. Within `keep_attention` it is "lean": the checkpoint keeps
only out and lse (and the layer's input, from which q, k and v are recomputed). Backward's all-to-all then carries q, k,
v and out again with dout, so neither it nor a hop is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from longctx.attention.backends.base import accumulator_dtype
from longctx.attention.heads import assign_heads
from longctx.attention.hybrid.passes import HybridPasses, Optional, Saved
from longctx.attention.hybrid.ulysses import ProcessUlyssesGroup
from longctx.attention.operator_common import AttentionInputs, RingSettings, make_passes, schema_of, unflatten
from longctx.attention.replay import keeping, replayed
from longctx.mesh import from_key


class HybridSettings(NamedTuple):
    """The ring's settings. with_lse: return the lse (else it is empty). lean: save this rank's own q, k, v and out
    instead of what the all-to-all delivered; backward repeats that all-to-all."""

    ring: RingSettings
    with_lse: bool
    lean: bool


class Results(NamedTuple):
    """The operator's results: out and lse of this rank's tokens, (B, H, T, Dv) and (B, H, T), lse empty unless
    with_lse; then what backward needs, of the group's tokens and this rank's heads: lse and, empty if lean, q, k, v,
    out and documents (as `Saved` in passes.py)."""

    out: torch.Tensor
    lse: torch.Tensor
    saved_lse: torch.Tensor
    saved_q: torch.Tensor
    saved_k: torch.Tensor
    saved_v: torch.Tensor
    saved_out: torch.Tensor
    saved_documents: torch.Tensor


_SCHEMA = f"{schema_of(AttentionInputs, RingSettings)}, bool with_lse, bool lean"


def hybrid_attention(
    inputs: AttentionInputs, settings: RingSettings, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) of `ring_attention`'s checked arguments; lse is empty unless with_lse."""
    out, lse, *_ = _forward(*inputs, *settings, with_lse, keeping())
    return out, lse


def _unflatten(arguments: Sequence[Any]) -> tuple[AttentionInputs, HybridSettings]:
    *arguments, with_lse, lean = arguments
    inputs, ring = unflatten(arguments, RingSettings)
    return inputs, HybridSettings(ring, with_lse, lean)


@torch.library.custom_op(
    "longctx::hybrid_attention",
    mutates_args=(),
    schema=f"({_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """Return Results."""
    (q, k, v, sink, alibi), settings = _unflatten(arguments)

    def compute() -> tuple[torch.Tensor, ...]:
        passes = _passes(q, v, alibi, settings, q.shape[1], k.shape[1])
        out, lse, saved = passes.forward(q, k, v, settings.ring.documents, sink, settings.with_lse)
        kept = (None,) * 5 if settings.lean else (saved.q, saved.k, saved.v, saved.out, saved.documents)
        return tuple(Results(out, *(q.new_empty(0) if x is None else x for x in (lse, saved.lse, *kept))))

    return replayed(compute)


@_forward.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, ...]:
    (q, k, v, _, _), settings = _unflatten(arguments)
    mesh, documents = from_key(settings.ring.mesh), settings.ring.documents
    share = assign_heads(int(q.shape[1]), int(k.shape[1]), mesh.ulysses_size)[mesh.ulysses_rank]
    batch, tokens = q.shape[0], q.shape[2] * mesh.ulysses_size
    lse = torch.empty(q.shape[:3], dtype=accumulator_dtype(q.dtype), device=q.device)
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    kept_lse = lse.new_empty((batch, share.query_count, tokens))
    if settings.lean:
        kept = [q.new_empty(0) for _ in range(5)]
    else:
        heads = (share.query_count, share.key_count, share.key_count, share.query_count)
        dims = (q.shape[-1], k.shape[-1], v.shape[-1], v.shape[-1])
        kept = [q.new_empty((batch, h, tokens, d)) for h, d in zip(heads, dims, strict=True)]
        kept.append(q.new_empty(0) if documents is None else documents.new_empty((batch, tokens)))
    return tuple(Results(out, lse if settings.with_lse else q.new_empty(0), kept_lse, *kept))


@torch.library.custom_op(
    "longctx::hybrid_attention_backward",
    mutates_args=(),
    schema=f"(int heads, int kv_heads, Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    heads: int, kv_heads: int, dout: torch.Tensor, dlse: Optional, out: torch.Tensor, lse: torch.Tensor,
    *arguments: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Return the gradients of the five inputs. lse, and q, k, v, out and documents unless lean, are those after
    forward's all-to-all; heads and kv_heads count those before it."""
    (q, k, v, sink, alibi), settings = _unflatten(arguments)
    passes = _passes(q, v, alibi, settings, heads, kv_heads)
    saved = Saved(q, k, v, settings.ring.documents, out, lse)
    if settings.with_lse and dlse is None:  # sent all the same: all ranks must send the same tensors
        dlse = torch.zeros(dout.shape[:3], dtype=lse.dtype, device=dout.device)
    if settings.lean:
        saved, dout, dlse = passes.gather(saved, dout, dlse)
    else:
        dout, dlse = passes.gather_gradients(dout, dlse)
    return passes.backward(saved, dout, dlse, sink, alibi)


@_backward.register_fake
def _(heads: int, kv_heads: int, dout: Any, dlse: Any, out: Any, lse: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
    q, k, v, sink, alibi = _unflatten(arguments)[0]
    batch, _, tokens, _ = dout.shape
    dq = q.new_empty((batch, heads, tokens, q.shape[-1]))
    dk, dv = (k.new_empty((batch, kv_heads, tokens, x.shape[-1])) for x in (k, v))
    return dq, dk, dv, *(lse.new_empty(0) if x is None else torch.empty_like(x) for x in (sink, alibi))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    (q, k, v, sink, alibi), settings = _unflatten(inputs)
    documents = settings.ring.documents
    results = Results(*output)
    ctx.heads, ctx.shape, ctx.count = (q.shape[1], k.shape[1]), results.out.shape, len(inputs)
    ctx.settings = settings._replace(ring=settings.ring._replace(documents=None, seeds=None))
    ctx.set_materialize_grads(False)
    out = results.out
    if not settings.lean:
        q, k, v, out = results.saved_q, results.saved_k, results.saved_v, results.saved_out
        documents = None if documents is None else results.saved_documents
    ctx.save_for_backward(q, k, v, sink, alibi, out, results.saved_lse, documents, settings.ring.seeds)


def _differentiate(ctx: Any, dout: Optional, dlse: Optional, *_: None) -> tuple[Optional, ...]:
    q, k, v, sink, alibi, out, lse, documents, seeds = ctx.saved_tensors
    ring, with_lse, lean = ctx.settings
    ring = ring._replace(documents=documents, seeds=seeds)
    if dout is None:
        dout = q.new_zeros(ctx.shape)
    if not with_lse:
        dlse = None  # the gradient of an empty lse
    grads = _backward(*ctx.heads, dout, dlse, out, lse, q, k, v, sink, alibi, *ring, with_lse, lean)
    given = (None if x is None else grad for x, grad in zip((q, k, v, sink, alibi), grads, strict=True))
    return *given, *(None for _ in range(ctx.count - len(grads)))


_forward.register_autograd(_differentiate, setup_context=_save)


def _passes(
    q: torch.Tensor, v: torch.Tensor, alibi: Optional, settings: HybridSettings, heads: int, kv_heads: int
) -> HybridPasses:
    """Return the passes for q (B, H, T, Dk) and v (B, G, T, Dv), whose dtype, device and widths choose the backend;
    heads and kv_heads are the model's, H and G those of either side of the all-to-all."""
    passes = make_passes(q, v, alibi, settings.ring)
    return HybridPasses(ProcessUlyssesGroup(from_key(settings.ring.mesh)), passes, heads, kv_heads)
