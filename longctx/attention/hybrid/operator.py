"""Heads exchanged for tokens inside, a ring outside (DeepSpeed Ulysses, 2309.14509, within Ring Attention).

`passes.py` says how; nothing of the ring's masks, layouts and backends changes. Forward sends q, k, v in one
message a member and out in one, backward dout in one and the gradients in one.

What backward needs is kept as it is after the exchange. Within `keep_attention` it is not: there only out and lse
outlive forward, so backward's message carries q, k, v and out as well, and neither exchange nor hop is ever repeated.
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.attention.backends.base import accumulator_dtype
from longctx.attention.call import SETTINGS, make_passes
from longctx.attention.heads import deal
from longctx.attention.hybrid.passes import HybridPasses, Optional, Whole
from longctx.attention.hybrid.ulysses import ProcessMembers
from longctx.attention.operator import INPUTS
from longctx.attention.replay import keeping, replayed
from longctx.mesh import from_key

# The operator. It also returns what backward needs; `lean` says that this stays behind, and comes by message again.


def attention(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of `ring_attention`'s checked inputs, settings, and whether lse is wanted (else it is empty)."""
    out, lse, *_ = torch.ops.longctx.hybrid_attention(*inputs, keeping())
    return out, lse


@torch.library.custom_op(
    "longctx::hybrid_attention",
    mutates_args=(),
    schema=f"({INPUTS}, {SETTINGS}, bool with_lse, bool lean) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: Optional,
    alibi: Optional,
    documents: Optional,
    *settings: Any,
) -> tuple[torch.Tensor, ...]:
    *passed, with_lse, lean = settings

    def compute() -> tuple[torch.Tensor, ...]:
        call = _call(q, v, alibi, documents, q.shape[1], k.shape[1], *passed)
        out, lse, whole = call.forward(q, k, v, documents, sink, with_lse)
        kept = (None,) * 5 if lean else (whole.q, whole.k, whole.v, whole.out, whole.documents)
        return out, *(q.new_empty(0) if x is None else x for x in (lse, whole.lse, *kept))

    return replayed(compute)


@_forward.register_fake
def _(q: Any, k: Any, v: Any, sink: Any, alibi: Any, documents: Any, *settings: Any) -> tuple[torch.Tensor, ...]:
    *_, with_lse, lean = settings
    members = from_key(settings[1])
    share = deal(int(q.shape[1]), int(k.shape[1]), members.ulysses_size)[members.ulysses_rank]
    batch, tokens = q.shape[0], q.shape[2] * members.ulysses_size
    lse = torch.empty(q.shape[:3], dtype=accumulator_dtype(q.dtype), device=q.device)
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    kept_lse = lse.new_empty((batch, share.query_count, tokens))
    if lean:
        kept = [q.new_empty(0) for _ in range(5)]
    else:
        heads = (share.query_count, share.key_count, share.key_count, share.query_count)
        dims = (q.shape[-1], k.shape[-1], v.shape[-1], v.shape[-1])
        kept = [q.new_empty((batch, h, tokens, d)) for h, d in zip(heads, dims, strict=True)]
        kept.append(q.new_empty(0) if documents is None else documents.new_empty((batch, tokens)))
    return out, lse if with_lse else q.new_empty(0), kept_lse, *kept


@torch.library.custom_op(
    "longctx::hybrid_attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? sink, "
    f"Tensor? alibi, int heads, int kv_heads, {SETTINGS}, bool with_lse, bool lean) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    dout: torch.Tensor,
    dlse: Optional,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sink: Optional,
    alibi: Optional,
    heads: int,
    kv_heads: int,
    documents: Optional,
    *settings: Any,
) -> tuple[torch.Tensor, ...]:
    *passed, with_lse, lean = settings
    call = _call(q, v, alibi, documents, heads, kv_heads, *passed)
    if with_lse and dlse is None:  # sent all the same: ranks must agree on what a message holds
        dlse = torch.zeros(dout.shape[:3], dtype=lse.dtype, device=dout.device)
    if lean:
        whole, dout, dlse = call.gather(q, k, v, documents, out, lse, dout, dlse)
    else:
        dout, dlse = call.gather_gradients(dout, dlse)
        whole = Whole(q, k, v, documents, out, lse)
    return call.backward(whole, dout, dlse, sink, alibi)


@_backward.register_fake
def _(
    dout: Any, dlse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, sink: Any, alibi: Any, heads: int, kv_heads: int,
    *settings: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    batch, _, tokens, _ = dout.shape
    shapes = (batch, heads, tokens, q.shape[-1]), (batch, kv_heads, tokens, k.shape[-1])
    per = (lse.new_empty(0) if x is None else torch.empty_like(x) for x in (sink, alibi))
    return q.new_empty(shapes[0]), *(k.new_empty((*shapes[1][:3], x.shape[-1])) for x in (k, v)), *per


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, sink, alibi, documents, seeds, *settings = inputs
    out, _, whole_lse, *kept = output
    ctx.set_materialize_grads(False)
    if settings[-1]:
        needed = [q, k, v, out, whole_lse, documents]
    else:
        needed = [*kept[:4], whole_lse, None if documents is None else kept[4]]
    ctx.save_for_backward(*needed, sink, alibi, seeds)
    ctx.settings, ctx.heads, ctx.shape = settings, (q.shape[1], k.shape[1]), out.shape


def _differentiate(ctx: Any, dout: Optional, dlse: Optional, *_: None) -> tuple[Optional, ...]:
    q, k, v, out, lse, documents, sink, alibi, seeds = ctx.saved_tensors
    if dout is None:
        dout = q.new_zeros(ctx.shape)
    if not ctx.settings[-2]:
        dlse = None  # the gradient of an empty lse
    inputs = (q, k, v, out, lse, sink, alibi, *ctx.heads, documents, seeds)
    *grads, dsink, dalibi = _backward(dout, dlse, *inputs, *ctx.settings)
    per = (None if x is None else grad for x, grad in ((sink, dsink), (alibi, dalibi)))
    return *grads, *per, *(None for _ in range(2 + len(ctx.settings)))


_forward.register_autograd(_differentiate, setup_context=_save)


def _call(
    q: torch.Tensor, v: torch.Tensor, alibi: Optional, documents: Optional, heads: int, kv_heads: int, *settings: Any
) -> HybridPasses:
    passes = make_passes(q, v, alibi, documents, *settings)
    return HybridPasses(ProcessMembers(from_key(settings[1])), passes, heads, kv_heads)
