"""cosine_attention (Cottention): causal, bidirectional or cross, on one device or a ring."""

from __future__ import annotations

import torch

from longctx.attention.arguments import check_tensors
from longctx.attention.backends.base import accumulator_dtype
from longctx.bounded.arguments import SequenceCall, check_ids, check_state, choose_backend
from longctx.bounded.cosine import forms as cosine_forms
from longctx.bounded.ranks.packed import attend_documents, separate_documents
from longctx.bounded.state import CosineState
from longctx.errors import AttentionError
from longctx.layout import Layout
from longctx.mesh import Mesh


def cosine_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    m: torch.Tensor,
    *,
    causal: bool = True,
    scale_on: str = "value",
    mesh: Mesh | None = None,
    layout: str | Layout = "zigzag",
    document_ids: torch.Tensor | None = None,
    length: int | None = None,
    state: CosineState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, CosineState]:
    """Attention by cosine similarity, without a softmax (Mongaras et al., 2024): time linear in the length, and a state
    that does not grow.

        value   out_t = sum_{j<=t} cos(q_t, k_j) n_j^-a v_j        a = sigmoid(m), n_j the tokens of the document so far
        query   out_t = n_t^-a sum_{j<=t} cos(q_t, k_j) v_j

    Args:
        q: (B, H, T, D), this rank's tokens. k: (B, G, T, D), v: (B, G, T, Dv), G dividing H; one floating dtype.
            Without `causal` (and a ring) k and v may have another length than q.
        m: (H,), or (G,) for scale_on="value"; learned, 0.5 at first.
        causal: a token reads itself and earlier tokens; else all tokens, and n is their number throughout.
        scale_on: where the scale is applied, "value" (the authors' code and checkpoints) or "query" (the paper's
            equation). Without `causal` both are the same. With "value", H exponents and G < H the state has H heads.
        mesh, layout, document_ids, length, state, return_state: as of `abc_attention`; a document is one run of an id.
        backend: "chunked", matrix products of torch; "triton", kernels for causal attention in bf16, fp16 and fp32,
            head dimensions up to 256; "auto", the kernels on a GPU where possible.

    Returns:
        out (B, H, T, Dv) in q's dtype [, state]. Padding gets 0 and no gradient.

    Raises:
        AttentionError: the arguments do not fit together, or are not supported.
    """
    call = SequenceCall(
        causal=causal, mesh=mesh, layout=layout, document_ids=document_ids, length=length, state=state,
        return_state=return_state, backend=backend,
    )  # fmt: skip
    return attend(q, k, v, m, call, scale_on=scale_on)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor, call: SequenceCall, *, scale_on: str = "value"
) -> torch.Tensor | tuple[torch.Tensor, CosineState]:
    """`cosine_attention` with the arguments that both operators share in one value, and over any link."""
    check_tensors(q, k, v)
    causal, state = call.causal, call.state
    unsupported = "" if causal else "the kernels are for causal attention; without causal it is two matrix products"
    backend = choose_backend(call.backend, q, v, unsupported)
    check_ids(call.document_ids, q, k, causal)
    if scale_on not in ("value", "query"):
        raise AttentionError(f"scale_on={scale_on!r}: use 'value' or 'query'")
    heads, group = q.shape[1], k.shape[1]
    on_query = scale_on == "query" or not causal
    if m.dim() != 1 or m.shape[0] not in ({heads} if on_query else {heads, group}) or not m.is_floating_point():
        raise AttentionError(
            f"m {tuple(m.shape)} of {m.dtype}: expected one floating-point number per query head, ({heads},)"
            + ("" if on_query else f", or per key head, ({group},)")
        )
    local = call.locate(k)
    check_state(state, local, CosineState, q.shape[0])
    assert state is None or isinstance(state, CosineState)
    if not on_query and m.shape[0] != group:  # query heads of one group scale the values differently: a state for each
        k, v = (x.repeat_interleave(heads // group, 1) for x in (k, v))
    exponent = m.to(accumulator_dtype(q.dtype)).sigmoid()
    inputs = cosine_forms.CosineInputs(q, k, v, exponent, on_query, backend)
    if not causal and separate_documents(local, q.shape[2], call.with_state):
        return attend_documents(inputs, local)
    form = cosine_forms.causal if causal else cosine_forms.over_all
    out, after = form(inputs, local, state, call.return_state)
    if not call.return_state:
        return out
    assert after is not None
    return out, after
