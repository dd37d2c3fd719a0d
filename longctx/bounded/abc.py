"""abc_attention: attention over a memory of M slots (ABC), causal, bidirectional or cross, on one device or a ring."""

from __future__ import annotations

import torch

from longctx.attention.arguments import check_documents, check_tensors, resolve_scale
from longctx.attention.backends.base import accumulator_dtype
from longctx.bounded.state import ABCState
from longctx.errors import AttentionError
from longctx.kernels.abc import reference
from longctx.layout import Layout
from longctx.mesh import Mesh


def abc_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    control: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    *,
    causal: bool = True,
    normalizer: str = "prefix",
    scale: float | None = None,
    mesh: Mesh | None = None,
    layout: str | Layout = "zigzag",
    document_ids: torch.Tensor | None = None,
    length: int | None = None,
    state: ABCState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, ABCState]:
    """Attention over a memory of M slots."""
    check_tensors(q, k, v)
    check_documents("document_ids", document_ids, q)
    if not causal or mesh is not None or not isinstance(control, torch.Tensor):
        raise AttentionError("not built yet")
    dtype = accumulator_dtype(q.dtype)
    before = None if state is None else (state.log_mass, state.keys, state.values)
    document = None if state is None else state.document
    if document_ids is None and document is not None:
        document_ids = document.clamp_min(0)[:, None].expand(-1, q.shape[2])
    out, after, document = reference.recurrent(
        *(x.to(dtype) for x in (q, k, v, control)),
        before,
        document_ids,
        document,
        normalizer=normalizer,
        scale=resolve_scale(scale, q),
    )
    out = out.to(q.dtype)
    return (out, ABCState(*after, document)) if return_state else out
