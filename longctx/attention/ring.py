"""`ring_attention`: exact attention over a sequence sharded over a ring of ranks, for any layout and mask.

Queries stay on their rank; blocks of keys and values travel (`schedule.py` plans it, `comm.py` sends them), and a
backend (`backends/`) merges each into the running result. One loop (`passes.py`) serves every layout, mask and ring
size; a ring of one sends nothing. Forward and backward are operators of torch.library: torch.compile sees one node, and
a checkpoint policy can save (out, lse) so that recomputation repeats no hop.
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.attention.arguments import check_documents, check_scores, check_tensors, resolve_scale, resolve_seeds
from longctx.attention.backends.base import BackwardQueries
from longctx.attention.band import make_rule
from longctx.attention.heads import check_members
from longctx.attention.hybrid.operator import hybrid_attention
from longctx.attention.operator_common import (
    AttentionInputs,
    RingSettings,
    fake_backward,
    fake_forward,
    make_passes,
    per_head,
    register_gradient,
    schema_of,
    unflatten,
)
from longctx.attention.passes import split
from longctx.attention.replay import replayed
from longctx.errors import AttentionError
from longctx.layout import Layout, get_layout
from longctx.mesh import Mesh


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mesh: Mesh | None = None,
    causal: bool = True,
    layout: str | Layout = "zigzag",
    window: int | tuple[int | None, int | None] | None = None,
    document_ids: torch.Tensor | None = None,
    length: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    alibi: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute exact attention of this rank's queries over the whole sequence.

    Every rank that holds a shard of the sequence calls it. On a mesh with ulysses > 1, an all-to-all within each
    ulysses group exchanges tokens for heads, and keys and values travel on the ring between groups.

    Args:
        q: (B, H, T, Dk), k: (B, G, T, Dk), v: (B, G, T, Dv): this rank's tokens in the layout's local order (what
            `shard` returns), G dividing H, one floating dtype, T the same on every rank.
        mesh: the grid of ranks; None, or a mesh with one rank per sequence, computes locally. ulysses is at most H and
            need not divide H or G.
        causal: hide later tokens, by global index.
        layout: how the sequence is sharded; must be the layout that `shard` was given.
        window: w: token i sees tokens i - w + 1 to i, and all later ones unless causal. (l, r): tokens i - l to i + r;
            None for no limit on that side. causal hides later tokens in any case.
        document_ids: (B, T) integers of this rank's tokens; a token sees only tokens with its own id. Equal ids are one
            document even with other ids between them (in abc_attention and cosine_attention a returning id is a new
            document). Negative ids are padding. Documents may cross ranks anywhere. All ranks give ids, or none does.
        length: number of real tokens in the whole sequence, if it was padded to ring * ulysses * T.
        scale: factor of q.k, any finite number; default 1 / sqrt(Dk).
        softcap: caps the scaled logits at softcap * tanh(x / softcap).
        sink: (H,) an additional logit per head in every softmax, without a value.
        alibi: (H,) slopes; slope * |i - j| of the global indices is subtracted from a logit, after the cap.
        dropout_p: probability of dropping an attention weight; the others are divided by 1 - dropout_p.
        dropout_seed: an int, or (B,) int64 with one seed per batch row; equal on all ranks of the sequence. The seed,
            the head and the global indices of query and key alone decide what is dropped, not the number of ranks.
        return_lse: also return the logarithm of the softmax's denominator (with the sink, before dropout).
        backend: "auto", "aten" (CPU; without softcap, alibi, dropout), "triton" or another of docs/kernels.md (GPU), or
            "reference".

    Returns:
        out (B, H, T, Dv) in q's dtype [, lse (B, H, T) in fp32, fp64 for fp64]. Both are differentiable by q, k, v,
        sink and alibi; the gradients of sink and alibi are this rank's part, to be summed over ranks as any weight's. A
        token that sees nothing, such as padding, gets out 0, lse -inf (with a sink: sink) and no gradient.

    Raises:
        AttentionError: the arguments do not fit together, or are not supported.
    """
    check_tensors(q, k, v)
    check_scores(q, softcap=softcap, sink=sink, alibi=alibi, dropout_p=dropout_p, dropout_seed=dropout_seed)
    check_documents("document_ids", document_ids, q)
    layout = get_layout(layout)
    ring, ulysses = (1, 1) if mesh is None else (mesh.ring_size, mesh.ulysses_size)
    check_members(q.shape[1], ulysses)
    if q.shape[2] != k.shape[2]:
        raise AttentionError(
            f"{q.shape[2]} queries and {k.shape[2]} keys on one rank: a sharded sequence has one length; "
            "block_attention takes two"
        )
    padded = q.shape[2] * ring * ulysses
    if padded % layout.multiple(ring, ulysses):
        raise AttentionError(
            f"{q.shape[2]} tokens per rank over ring {ring} x ulysses {ulysses} make {padded}, and layout "
            f"{layout.name!r} needs a multiple of {layout.multiple(ring, ulysses)}; pad with longctx.shard"
        )
    if length is not None and not 0 < length <= padded:
        raise AttentionError(
            f"length={length}: the ranks hold {padded} tokens; give the true global length, 1 to {padded}"
        )
    rule = make_rule(causal, window)
    inputs = AttentionInputs(q, k, v, sink, alibi)
    settings = RingSettings(
        documents=document_ids,
        seeds=resolve_seeds(q, dropout_p, dropout_seed),
        mesh=mesh.key if mesh is not None and mesh.sequence_size > 1 else "",
        layout=layout.name,
        left=rule.left,
        right=rule.right,
        length=None if length == padded else length,
        scale=resolve_scale(scale, q),
        softcap=softcap,
        dropout_p=dropout_p,
        backend=backend,
    )
    if ulysses > 1:
        out, lse = hybrid_attention(inputs, settings, return_lse)
    else:
        out, lse = _forward(*inputs, *settings)
    return (out, lse) if return_lse else out


# The operator of the ring; hybrid/operator.py has that of the ring with ulysses > 1. Its arguments are flat, as a
# schema demands: q, k, v, sink, alibi, then the fields of RingSettings in order; `unflatten` restores the names.

_SCHEMA = schema_of(AttentionInputs, RingSettings)


@torch.library.custom_op("longctx::ring_attention", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor, Tensor)")
def _forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    (q, k, v, sink, alibi), settings = unflatten(arguments, RingSettings)
    passes = make_passes(q, v, alibi, settings)
    out, lse = replayed(lambda: passes.forward(q, k, v, settings.documents, sink))
    return out, lse


@torch.library.custom_op(
    "longctx::ring_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    """Return dq, dk and dv as one flat tensor, dsink and dalibi. (An operator's results must not share memory, and dk
    and dv arrive in one buffer.)"""
    (q, k, v, sink, alibi), settings = unflatten(arguments, RingSettings)
    queries = BackwardQueries(q, out, lse, dout, dlse)
    dq, dkv, dalibi = make_passes(q, v, alibi, settings).backward(queries, k, v, settings.documents)
    return dq, dkv, *per_head(queries, sink, alibi, dalibi)


_forward.register_fake(fake_forward)


@_backward.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, ...]:
    dq, dk, dv, dsink, dalibi = fake_backward(*arguments)
    return dq, dk.new_empty(dk.numel() + dv.numel()), dsink, dalibi


def _gradients(
    dout: torch.Tensor, dlse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    dq, dkv, dsink, dalibi = _backward(dout, dlse, out, lse, *arguments)
    (_, k, v, _, _), _ = unflatten(arguments, RingSettings)
    return dq, *split(dkv, k, v), dsink, dalibi


register_gradient(_forward, _gradients)
