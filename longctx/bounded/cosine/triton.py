"""Causal cosine attention by the Triton kernels: `cosine/chunks.py` on a GPU or interpreted.

Only the inputs are saved; backward recomputes the states. Importing this file imports triton, so it is imported when
that backend is chosen.
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.attention.backends.triton import arch, dense, on_device
from longctx.bounded.cosine.chunks import CosineTensors
from longctx.bounded.shared_triton import empty_like, output_gradient, state_gradient, with_documents
from longctx.derivative import first_only
from longctx.kernels.cosine.fused import Causal, Side

Optional = torch.Tensor | None


@first_only
class FusedCosine(torch.autograd.Function):
    """(on_query, *CosineTensors) -> (out, S after the last token), in bf16, fp16 or fp32; S in fp32."""

    @staticmethod
    def forward(ctx: Any, on_query: bool, *tensors: Optional) -> tuple[torch.Tensor, torch.Tensor]:
        x = CosineTensors(*tensors)  # type: ignore[arg-type]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.on_query = on_query
        out = torch.empty((*x.q.shape[:3], x.v.shape[3]), dtype=x.q.dtype, device=x.q.device)
        with on_device(x.q.device):
            call = _call(x, on_query)
            queries, keys, states = _states(call, x.state)
            call.output(queries, keys, states, out).run()
        return out, states[:, :, -1].clone()

    @staticmethod
    def backward(ctx: Any, dout: Optional, dstate: Optional) -> Any:
        x = CosineTensors(*ctx.saved_tensors)
        dout, dstate = output_gradient(dout, x.q, x.v), state_gradient(dstate, x.state)
        dq, dk, dv, dsize = empty_like(x.q, x.k, x.v, x.size)
        of_queries, of_keys = (dsize, None) if ctx.on_query else (None, dsize)
        with on_device(x.q.device):
            call = _call(x, ctx.on_query)
            queries, keys, states = _states(call, x.state)
            call.queries(queries, keys, dout, states, dq, of_queries).run()
            call.write(queries, dout, states, after=False).run()  # states now hold the gradient of S
            call.scan(states, dstate, down=True).run()
            call.keys(queries, keys, dout, states, dk, of_keys).run()
            call.values(queries, keys, dout, states, dv).run()
        return None, dq, dk, dv, dsize, states[:, :, 0].clone(), None, None


def _call(x: CosineTensors, on_query: bool) -> Causal:
    inputs = dense(x.q), dense(x.k), dense(x.v), x.size, on_query
    return with_documents(lambda documents: Causal(*inputs, documents, arch(x.q.device)), x.ids, x.document)


def _states(call: Causal, start: torch.Tensor) -> tuple[Side, Side, torch.Tensor]:
    """Return the factors of queries, those of keys, and the state before each chunk and after the last."""
    first, queries = call.lengths(queries=True)
    second, keys = call.lengths(queries=False)
    first.run()
    second.run()
    states = call.states()
    call.write(keys, call.v, states, after=True).run()
    call.scan(states, start.contiguous(), down=False).run()
    return queries, keys, states
