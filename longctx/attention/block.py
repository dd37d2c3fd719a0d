"""`block_attention`: attention of one block of queries with one block of keys, on one device.

It calls the backends that the ring calls at every step. Queries and keys may differ in number, and queries may begin at
any position (a decoding step, a chunk of a prompt).
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.attention import sink as sinks
from longctx.attention.arguments import check_documents, check_scores, check_tensors, resolve_scale, resolve_seeds
from longctx.attention.backends.base import Backend, BackwardQueries, KeyBlock, StepGradients
from longctx.attention.backends.choose import choose_backend, pattern_of
from longctx.attention.band import Rule, make_rule
from longctx.attention.mask import BlockMask
from longctx.attention.operator_common import (
    AttentionInputs,
    BlockSettings,
    fake_backward,
    fake_forward,
    make_scores,
    per_head,
    register_gradient,
    schema_of,
    unflatten,
)
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
    """Compute exact attention on one device in memory linear in the lengths, forward and backward.

    Args:
        q: (B, H, Tq, Dk). k: (B, G, Tk, Dk), v: (B, G, Tk, Dv) with G dividing H; one floating dtype.
        causal: hide later keys.
        window: w: the query at position i sees keys i - w + 1 to i, and all later ones unless causal. (l, r): keys
            i - l to i + r; None for no limit on that side. causal hides later keys in any case.
        document_ids: (B, Tq) integers; a query sees only keys with its own id. Equal ids are one document even with
            other ids between them (in abc_attention and cosine_attention a returning id is a new document). Negative
            ids are padding.
        key_document_ids: (B, Tk); default document_ids if Tq = Tk.
        q_offset: position of the first query among the keys; default Tk - Tq (bottom-right aligned: the queries are the
            last tokens), 0 is scaled_dot_product_attention's top-left.
        scale: factor of q.k, any finite number; default 1 / sqrt(Dk).
        softcap: caps the scaled logits at softcap * tanh(x / softcap).
        sink: (H,) an additional logit per head in every softmax, without a value.
        alibi: (H,) slopes; slope * |i - j| is subtracted from a logit, after the cap.
        dropout_p: probability of dropping an attention weight; the others are divided by 1 - dropout_p.
        dropout_seed: an int, or (B,) int64 with one seed per batch row. The seed, the head and the positions of query
            and key alone decide what is dropped.
        backend: "auto", "aten" (CPU; without softcap, alibi, dropout), "triton" or another of docs/kernels.md (GPU), or
            "reference".

    Returns:
        out (B, H, Tq, Dv) in q's dtype and lse (B, H, Tq) in fp32 (fp64 for fp64), the natural logarithm of the
        softmax's denominator (with the sink, before dropout). Both are differentiable by q, k, v, sink and alibi. A
        query that sees no key gets out 0, lse -inf (with a sink: sink) and no gradient.

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
    settings = BlockSettings(
        q_documents=document_ids,
        k_documents=key_document_ids,
        seeds=resolve_seeds(q, dropout_p, dropout_seed),
        q_offset=k_len - q_len if q_offset is None else q_offset,
        left=rule.left,
        right=rule.right,
        scale=resolve_scale(scale, q),
        softcap=softcap,
        dropout_p=dropout_p,
        backend=backend,
    )
    return _forward(q, k, v, sink, alibi, *settings)


_SCHEMA = schema_of(AttentionInputs, BlockSettings)


# An operator's arguments are flat: AttentionInputs, then BlockSettings, in the order of their fields.


@torch.library.custom_op("longctx::block_attention", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor, Tensor)")
def _forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    (q, k, v, sink, alibi), settings = unflatten(arguments, BlockSettings)
    backend, block = _block(q, k, v, alibi, settings)
    out, lse, first = sinks.begin(q, v, sink)
    backend.forward_step(q, block, out, lse, first)
    return out.to(q.dtype), lse


@torch.library.custom_op(
    "longctx::block_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    (q, k, v, sink, alibi), settings = unflatten(arguments, BlockSettings)
    backend, block = _block(q, k, v, alibi, settings)
    queries = BackwardQueries(q, out, lse, dout, dlse)
    dq, dk, dv = (torch.empty(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    dalibi = None if alibi is None else lse.new_zeros(alibi.shape)
    backend.backward_step(backend.prepare_backward(queries), block, StepGradients(dq, dk, dv, dalibi), first=True)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *per_head(queries, sink, alibi, dalibi)


def _block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alibi: torch.Tensor | None, settings: BlockSettings
) -> tuple[Backend, KeyBlock]:
    """Return the backend of a call and its one block of keys."""
    q_spans, k_spans = (Span(settings.q_offset, q.shape[2]),), (Span(0, k.shape[2]),)
    rule = Rule(settings.left, settings.right)
    mask = BlockMask(q_spans, k_spans, rule, settings.q_documents, settings.k_documents)
    scores = make_scores(q, alibi, settings)
    backend = choose_backend(settings.backend, q, v, scores, pattern_of(rule, settings.q_documents))
    return backend, KeyBlock(k, v, mask, scores)


_forward.register_fake(fake_forward)
_backward.register_fake(fake_backward)
register_gradient(_forward, _backward)
