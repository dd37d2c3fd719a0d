"""cosine_attention (Cottention): causal or bidirectional, on one device or a ring."""

from __future__ import annotations

import torch

from longctx.attention.arguments import check_documents, check_tensors
from longctx.attention.backends.base import accumulator_dtype
from longctx.bounded.state import CosineState
from longctx.errors import AttentionError
from longctx.kernels.cosine import reference
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
    """Cosine attention."""
    check_tensors(q, k, v)
    check_documents("document_ids", document_ids, q)
    if not causal or mesh is not None:
        raise AttentionError("not built yet")
    dtype = accumulator_dtype(q.dtype)
    heads = q.shape[1] // k.shape[1]
    before = (None, None) if state is None else (state.memory, state.count)
    document = None if state is None else state.document
    if document_ids is None and document is not None:
        document_ids = document.clamp_min(0)[:, None].expand(-1, q.shape[2])
    full_k, full_v = (x.to(dtype).repeat_interleave(heads, 1) for x in (k, v))
    out, memory, count, document = reference.recurrent(
        q.to(dtype), full_k, full_v, m.to(dtype), *before, document_ids, document, scale_on=scale_on
    )
    out = out.to(q.dtype)
    return (out, CosineState(memory, count, document)) if return_state else out
