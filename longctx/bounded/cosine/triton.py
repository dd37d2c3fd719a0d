"""Causal cosine attention by the Triton kernels: the function of `cosine_chunks.chunked`, on a GPU or interpreted.

Only the inputs are kept; backward makes the states again. Importing this file imports triton, so it is imported when
that backend is asked for.
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.attention.backends.triton import arch, dense, on_device
from longctx.bounded.chunks import Runs
from longctx.derivative import first_only
from longctx.kernels.cosine.fused import Causal, Documents

Optional = torch.Tensor | None


@first_only
class Fused(torch.autograd.Function):
    """(q, k, v, size, S) -> (out, S after); as `cosine_chunks.chunked`, in bf16, fp16 or fp32, the state in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        size: torch.Tensor,
        state: torch.Tensor,
        ids: Optional,
        document: Optional,
        on_query: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, size, state, ids, document)
        ctx.on_query = on_query
        out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
        with on_device(q.device):
            call = _call(q, k, v, size, ids, document, on_query)
            queries, keys, states = _states(call, state)
            call.output(queries, keys, states, out)()
        return out, states[:, :, -1].clone()

    @staticmethod
    def backward(ctx: Any, dout: Optional, dstate: Optional) -> Any:
        q, k, v, size, state, ids, document = ctx.saved_tensors
        dout = q.new_zeros((*q.shape[:3], v.shape[3])) if dout is None else dense(dout)
        dstate = torch.zeros_like(state) if dstate is None else dstate
        dq, dk, dv, dsize = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, size))
        of_queries, of_keys = (dsize, None) if ctx.on_query else (None, dsize)
        with on_device(q.device):
            call = _call(q, k, v, size, ids, document, ctx.on_query)
            queries, keys, states = _states(call, state)
            call.queries(queries, keys, dout, states, dq, of_queries)()
            call.write(queries, dout, states, after=False)()
            call.scan(states, dstate.contiguous(), down=True)()
            call.keys(queries, keys, dout, states, dk, of_keys)()
            call.values(queries, keys, dout, states, dv)()
        return dq, dk, dv, dsize, states[:, :, 0].clone(), None, None, None


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    size: torch.Tensor,
    ids: Optional,
    document: Optional,
    on_query: bool,
) -> Causal:
    made = Causal(dense(q), dense(k), dense(v), size, on_query, None, arch(q.device))
    if ids is None:
        return made
    return Causal(made.q, made.k, made.v, size, on_query, documents_of(ids, document, made.chunk), made.arch)


def documents_of(ids: torch.Tensor, document: Optional, chunk: int) -> Documents:
    """What the kernels need to know of packed documents: ids (B, T), and the one before them (B,) or None."""
    runs = Runs(ids, document)
    edges = runs.edges(chunk)
    return Documents(runs.ids.contiguous(), edges, (edges[:, 1:] == edges[:, :-1]).float())


def _states(call: Causal, start: torch.Tensor) -> Any:
    """(the factors of queries, those of keys, the state before each chunk and after the last)."""
    first, queries = call.lengths(queries=True)
    second, keys = call.lengths(queries=False)
    first()
    second()
    states = call.states()
    call.write(keys, call.v, states, after=True)()
    call.scan(states, start.contiguous(), down=False)()
    return queries, keys, states
