"""ring_attention: exact attention over a sequence that is sharded over a ring of ranks, for any layout and mask.

Queries stay; blocks of keys and values pass by (`schedule.py` says when, `comm.py` moves them) and each is merged into
the running result by a backend (`block.py`). The same loop serves every layout, mask and ring size; a ring of one sends
nothing. Forward and backward are operators of torch.library, so that torch.compile sees one node and a checkpoint
policy can save (out, lse) and so never repeat the hops.
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.attention.arguments import check_documents, check_scores, check_tensors, resolve_scale, resolve_seeds
from longctx.attention.backends.base import Rows
from longctx.attention.band import make_rule
from longctx.attention.call import SETTINGS, make_passes
from longctx.attention.heads import check_members
from longctx.attention.hybrid.operator import attention as hybrid_attention
from longctx.attention.operator import INPUTS, fake_backward, fake_forward, per_head, register_gradient
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
    """Exact attention over the whole sequence, from and to this rank's part of it. Every rank that holds a part of the
    sequence calls it; where the mesh has ulysses > 1, they exchange heads inside and pass keys and values outside.

    Args:
        q: (B, H, T, Dk), k: (B, G, T, Dk), v: (B, G, T, Dv): this rank's tokens in the layout's local order (what
            `shard` returns), G dividing H, one floating dtype, T the same on every rank.
        mesh: the grid of ranks; None, or one rank a sequence, computes locally. ulysses is at most H; it need divide
            neither H nor G.
        causal: a token sees no later token, by global index.
        layout: how the sequence is dealt out; must be the one `shard` was given.
        window: tokens visible to the left including the token itself, or (strictly left, strictly right).
        document_ids: (B, T) integers, this rank's part; a token sees only tokens of its own id, wherever they stand;
            negative ids are padding. Documents may cross ranks anywhere. Ids travel with the keys; all ranks give them,
            or none.
        length: the true global length where it is less than T times ring and ulysses: the rest is padding.
        scale: of the logits, any finite number; default 1 / sqrt(Dk).
        softcap: bends the scaled logits to within (-softcap, softcap): softcap * tanh(x / softcap).
        sink: (H,) one more logit in every query's softmax, without a value.
        alibi: (H,) slopes; a logit loses slope * |i - j| of the global indices, after the cap.
        dropout_p: the share of the probabilities that is dropped; the others are divided by 1 - dropout_p.
        dropout_seed: an int, or (B,) int64 with one seed a row; equal on all ranks of the sequence. With the head
            and the global indices of query and key it decides what is dropped, so the number of ranks does not.
        return_lse: also return the logarithm of the softmax's denominator (sink included, nothing dropped).
        backend: "auto", "aten" (CPU; without softcap, alibi, dropout), "triton" or another of docs/kernels.md (GPU), or
            "reference".

    Returns:
        out (B, H, T, Dv) in q's dtype [, lse (B, H, T) in fp32, fp64 for fp64]; both differentiable, by q, k, v, sink
        and alibi (of the last two, each rank has its own tokens' part: to be summed over ranks, as of any weight). A
        token that sees nothing, padding for one, gets out 0, lse -inf (with a sink: sink) and no gradient.

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
            f"{q.shape[2]} tokens a rank over ring {ring} x ulysses {ulysses} make {padded}, and layout "
            f"{layout.name!r} needs a multiple of {layout.multiple(ring, ulysses)}; pad with longctx.shard"
        )
    if length is not None and not 0 < length <= padded:
        raise AttentionError(
            f"length={length}: the ranks hold {padded} tokens; give the true global length, 1 to {padded}"
        )
    rule = make_rule(causal, window)
    inputs = (
        q,
        k,
        v,
        sink,
        alibi,
        document_ids,
        resolve_seeds(q, dropout_p, dropout_seed),
        mesh.key if mesh is not None and mesh.sequence_size > 1 else "",
        layout.name,
        rule.left,
        rule.right,
        None if length == padded else length,
        resolve_scale(scale, q),
        softcap,
        dropout_p,
        backend,
    )
    if ulysses > 1:
        out, lse = hybrid_attention(*inputs, return_lse)
    else:
        out, lse = torch.ops.longctx.ring_attention(*inputs)
    return (out, lse) if return_lse else out


# The operator of a ring; that of a ring with exchanged heads is in hybrid.py.


@torch.library.custom_op(
    "longctx::ring_attention", mutates_args=(), schema=f"({INPUTS}, {SETTINGS}) -> (Tensor, Tensor)"
)
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor | None,
    alibi: torch.Tensor | None,
    documents: torch.Tensor | None,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = replayed(lambda: make_passes(q, v, alibi, documents, *settings).forward(q, k, v, documents, sink))
    return out, lse


@torch.library.custom_op(
    "longctx::ring_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {INPUTS}, {SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor | None,
    alibi: torch.Tensor | None,
    documents: torch.Tensor | None,
    *settings: Any,
) -> tuple[torch.Tensor, ...]:
    rows = Rows(q, out, lse, dout, dlse)
    dq, dkv, dalibi = make_passes(q, v, alibi, documents, *settings).backward(rows, k, v, documents)
    return dq, dkv, *per_head(rows, sink, alibi, dalibi)


_forward.register_fake(fake_forward)


@_backward.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, ...]:
    dq, dk, dv, dsink, dalibi = fake_backward(*arguments)
    return dq, dk.new_empty(dk.numel() + dv.numel()), dsink, dalibi


def _gradients(
    dout: torch.Tensor, dlse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, *inputs: Any
) -> tuple[torch.Tensor, ...]:
    dq, dkv, dsink, dalibi = _backward(dout, dlse, out, lse, *inputs)
    return dq, *split(dkv, inputs[1], inputs[2]), dsink, dalibi


register_gradient(_forward, _gradients)
