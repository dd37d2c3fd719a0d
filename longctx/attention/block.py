"""One query block with one key block on one device: `block_attention`, and the choice of a backend for every caller.

The ring calls the same backends step by step; this file is the ring of one with no schedule, where queries and keys may
differ in number and queries may start anywhere (a decode step, a chunk of a prompt).
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch

from longctx.attention.arguments import check_documents, check_tensors, refuse_unbuilt, resolve_scale
from longctx.attention.backends.aten import AtenBackend
from longctx.attention.backends.base import Backend, Rows, accumulator_dtype
from longctx.attention.backends.reference import ReferenceBackend
from longctx.attention.band import Rule, make_rule
from longctx.attention.mask import BlockMask
from longctx.errors import AttentionError
from longctx.layout import Span

log = logging.getLogger("longctx")


def choose_backend(name: str, device: torch.device) -> Backend:
    """The backend of that name, or the fastest for the device if `name` is "auto" (announced once, with the reason).

    Raises:
        AttentionError: unknown, or not available for this device.
    """
    if name == "auto":
        name, reason = _best(device.type)
        _announce(device.type, name, reason)
    if name == "reference":
        return ReferenceBackend()
    if name == "aten":
        if device.type != "cpu":
            raise AttentionError(
                f"backend='aten' is torch's CPU operator, and the tensors are on {device}; use 'reference'"
            )
        return AtenBackend()
    if name == "triton":
        raise AttentionError("backend='triton' is not part of this version; use 'auto', 'aten' (CPU) or 'reference'")
    raise AttentionError(f"backend={name!r} is unknown; use 'auto', 'aten', 'reference' or 'triton'")


def _best(device_type: str) -> tuple[str, str]:
    if device_type == "cpu":
        return "aten", "torch's fused flash attention for CPUs"
    return "reference", f"no fused kernel for {device_type} in this version, so plain PyTorch tiles: correct and slow"


@cache
def _announce(device_type: str, name: str, reason: str) -> None:
    log.info("attention on %s: backend %r (%s)", device_type, name, reason)


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
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention on one device, block by block: memory linear in the lengths, forward and backward.

    Args:
        q: (B, H, Tq, Dk). k: (B, G, Tk, Dk), v: (B, G, Tk, Dv) with G dividing H; one floating dtype.
        causal: a query sees no later key.
        window: keys a query sees to its left including itself, or (strictly left, strictly right).
        document_ids: (B, Tq) integers; a query sees only keys of its own document; negative ids are padding.
        key_document_ids: (B, Tk); the same as document_ids where Tq = Tk.
        q_offset: position of the first query among the keys; default Tk - Tq (bottom-right aligned: the queries are the
            last tokens), 0 is scaled_dot_product_attention's top-left.
        scale: of the logits; default 1 / sqrt(Dk).
        backend: "auto", "aten" (CPU) or "reference".

    Returns:
        out (B, H, Tq, Dv) in q's dtype and lse (B, H, Tq) in fp32 (fp64 for fp64), the natural logarithm of the
        softmax's denominator; both differentiable. A query that sees no key gets out 0, lse -inf and no gradient.

    Raises:
        AttentionError: the arguments do not fit together, or are not supported.
    """
    refuse_unbuilt(softcap=softcap, sink=sink, alibi=alibi, dropout_p=dropout_p)
    check_tensors(q, k, v)
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
        q, k, v, document_ids, key_document_ids, offset, rule.left, rule.right, resolve_scale(scale, q), backend
    )


# The operator. Its backward always computes all three gradients, as the ring's must.

_MASK = "Tensor? q_documents, Tensor? k_documents, int q_offset, int? left, int? right, float scale, str backend"


@torch.library.custom_op(
    "longctx::block_attention", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {_MASK}) -> (Tensor, Tensor)"
)
def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    backend, mask, scale = _settings(q, k, *settings)
    lse = torch.empty(q.shape[:3], dtype=accumulator_dtype(q.dtype), device=q.device)
    out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=lse.dtype, device=q.device)
    backend.forward_step(q, k, v, mask, scale, out, lse, True)
    return out.to(q.dtype), lse


@torch.library.custom_op(
    "longctx::block_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_MASK}) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    backend, mask, scale = _settings(q, k, *settings)
    dq, dk, dv = (torch.empty(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    backend.backward_step(backend.prepare_backward(Rows(q, out, lse, dout, dlse)), k, v, mask, scale, dq, dk, dv, True)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _settings(
    q: torch.Tensor,
    k: torch.Tensor,
    q_documents: torch.Tensor | None,
    k_documents: torch.Tensor | None,
    q_offset: int,
    left: int | None,
    right: int | None,
    scale: float,
    backend: str,
) -> tuple[Backend, BlockMask, float]:
    """The operator's plain arguments as objects."""
    spans = (Span(q_offset, q.shape[2]),), (Span(0, k.shape[2]),)
    mask = BlockMask(*spans, Rule(left, right), q_documents, k_documents)
    return choose_backend(backend, q.device), mask, scale


def fake_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as an attention operator returns them, without values: for tracing."""
    lse = torch.empty(q.shape[:3], dtype=accumulator_dtype(q.dtype), device=q.device)
    return torch.empty((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device), lse


def fake_backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *settings: Any
) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv) without values: for tracing."""
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


_forward.register_fake(fake_forward)
_backward.register_fake(fake_backward)


def register_gradient(forward: Any, backward: Any) -> None:
    """Autograd for an operator (q, k, v, *settings) -> (out, lse) whose backward operator takes
    (dout, dlse or None, q, k, v, out, lse, *settings); tensors among the settings are document ids."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.set_materialize_grads(False)  # an unused lse must not cost a gradient
        ctx.save_for_backward(*inputs[:3], *output, *(x for x in inputs[3:] if isinstance(x, torch.Tensor)))
        ctx.settings = [None if isinstance(x, torch.Tensor) else (x,) for x in inputs[3:]]

    def differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, *documents = ctx.saved_tensors
        ids = iter(documents)
        settings = [next(ids) if x is None else x[0] for x in ctx.settings]
        if dout is None:
            dout = torch.zeros_like(out)
        grads = backward(dout, dlse, q, k, v, out, lse, *settings)
        return (*grads, *(None for _ in settings))

    forward.register_autograd(differentiate, setup_context=save)


register_gradient(_forward, _backward)
