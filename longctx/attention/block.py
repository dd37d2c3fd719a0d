"""One query block with one key block on one device: `block_attention`.

The ring calls the same backends step by step; this file is the ring of one with no schedule, where queries and keys may
differ in number and queries may start anywhere (a decode step, a chunk of a prompt).
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.attention import sink as sinks
from longctx.attention.arguments import check_documents, check_scores, check_tensors, resolve_scale, resolve_seeds
from longctx.attention.backends.base import Backend, Rows
from longctx.attention.backends.choose import choose_backend, pattern_of
from longctx.attention.band import Rule, make_rule
from longctx.attention.mask import BlockMask
from longctx.attention.operator import INPUTS, fake_backward, fake_forward, make_scores, per_head, register_gradient
from longctx.attention.scores import Scores
from longctx.errors import AttentionError
from longctx.layout import Span


def block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
    document_ids: torch.Tensor | None = None,
    key_document_ids: torch.Tensor | None = None,
    q_offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    alibi: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention on one device, block by block: memory linear in the lengths, forward and backward.

    Args:
        q: (B, H, Tq, Dk). k: (B, G, Tk, Dk), v: (B, G, Tk, Dv) with G dividing H; one floating dtype.
        causal: a query sees no later key.
        window: keys a query sees to its left including itself, or (strictly left, strictly right).
        document_ids: (B, Tq) integers; a query sees only keys of its own id, wherever they stand; negative ids are
            padding.
        key_document_ids: (B, Tk); the same as document_ids where Tq = Tk.
        q_offset: position of the first query among the keys; default Tk - Tq (bottom-right aligned: the queries are the
            last tokens), 0 is scaled_dot_product_attention's top-left.
        scale: of the logits, any finite number; default 1 / sqrt(Dk).
        softcap: bends the scaled logits to within (-softcap, softcap): softcap * tanh(x / softcap).
        sink: (H,) one more logit in every query's softmax, without a value.
        alibi: (H,) slopes; a logit loses slope * |i - j|, after the cap.
        dropout_p: the share of the probabilities that is dropped; the others are divided by 1 - dropout_p.
        dropout_seed: an int, or (B,) int64 with one seed a row. With the head and the positions of query and key it
            decides what is dropped, and nothing else does.
        backend: "auto", "aten" (CPU; without softcap, alibi, dropout), "triton" or another of docs/kernels.md (GPU), or
            "reference".

    Returns:
        out (B, H, Tq, Dv) in q's dtype and lse (B, H, Tq) in fp32 (fp64 for fp64), the natural logarithm of the
        softmax's denominator (sink included, nothing dropped); both differentiable, by q, k, v, sink and alibi. A query
        that sees no key gets out 0, lse -inf (with a sink: sink) and no gradient.

    Raises:
        AttentionError: the arguments do not fit together, or are not supported.
    """
    check_tensors(q, k, v)
    check_scores(q, softcap=softcap, sink=sink, alibi=alibi, dropout_p=dropout_p, dropout_seed=dropout_seed)
    q_len, k_len = q.shape[2], k.shape[2]
    if document_ids is not None and key_document_ids is None and q_len == k_len:
        key_document_ids = document_ids
    if (document_ids is None) != (key_document_ids is None):
        raise AttentionError(
            "document_ids and key_document_ids belong together when queries and keys differ in number "
            f"({q_len} and {k_len} here); give both"
        )
    check_documents("document_ids", document_ids, q)
    check_documents("key_document_ids", key_document_ids, k)
    rule = make_rule(causal, window)
    offset = k_len - q_len if q_offset is None else q_offset
    return torch.ops.longctx.block_attention(
        q,
        k,
        v,
        sink,
        alibi,
        document_ids,
        key_document_ids,
        resolve_seeds(q, dropout_p, dropout_seed),
        offset,
        rule.left,
        rule.right,
        resolve_scale(scale, q),
        softcap,
        dropout_p,
        backend,
    )


# The operator. Its backward always computes all gradients, as the ring's must.

_SETTINGS = (
    "Tensor? q_documents, Tensor? k_documents, Tensor? seeds, int q_offset, int? left, int? right, float scale, "
    "float? softcap, float dropout_p, str backend"
)


@torch.library.custom_op(
    "longctx::block_attention", mutates_args=(), schema=f"({INPUTS}, {_SETTINGS}) -> (Tensor, Tensor)"
)
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor | None,
    alibi: torch.Tensor | None,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    backend, mask, scores = _settings(q, k, v, alibi, *settings)
    out, lse, first = sinks.begin(q, v, sink)
    backend.forward_step(q, k, v, mask, scores, out, lse, first)
    return out.to(q.dtype), lse


@torch.library.custom_op(
    "longctx::block_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {INPUTS}, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    *settings: Any,
) -> tuple[torch.Tensor, ...]:
    backend, mask, scores = _settings(q, k, v, alibi, *settings)
    rows = Rows(q, out, lse, dout, dlse)
    dq, dk, dv = (torch.empty(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    dalibi = None if alibi is None else lse.new_zeros(alibi.shape)
    backend.backward_step(backend.prepare_backward(rows), k, v, mask, scores, dq, dk, dv, True, dalibi)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *per_head(rows, sink, alibi, dalibi)


def _settings(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alibi: torch.Tensor | None,
    q_documents: torch.Tensor | None,
    k_documents: torch.Tensor | None,
    seeds: torch.Tensor | None,
    q_offset: int,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    backend: str,
) -> tuple[Backend, BlockMask, Scores]:
    """The operator's plain arguments as objects."""
    spans = (Span(q_offset, q.shape[2]),), (Span(0, k.shape[2]),)
    rule = Rule(left, right)
    mask = BlockMask(*spans, rule, q_documents, k_documents)
    scores = make_scores(q, scale, softcap, alibi, dropout_p, seeds)
    return choose_backend(backend, q, v, scores, pattern_of(rule, q_documents)), mask, scores


_forward.register_fake(fake_forward)
_backward.register_fake(fake_backward)
register_gradient(_forward, _backward)
