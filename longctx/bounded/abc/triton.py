"""Causal ABC with the prefix normalizer by the Triton kernels: `abc_chunks.Chunked` on a GPU or interpreted.

Only the inputs are kept; backward makes the masses and memories again. Importing this file imports triton, so it is
imported when that backend is asked for.
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.attention.backends.triton import arch, dense, on_device
from longctx.bounded.cosine.triton import documents_of
from longctx.derivative import first_only
from longctx.kernels.abc.fused import Causal, Masses

Optional = torch.Tensor | None


@first_only
class Fused(torch.autograd.Function):
    """(q, k, v, s, z, K, V before) -> (out, z, K, V after): one control for keys and values, logits of any size."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        s: torch.Tensor,
        z: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        ids: Optional,
        document: Optional,
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, s, z, keys, values, ids, document)
        ctx.scale = scale
        out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
        with on_device(q.device):
            call = _call(q, k, v, s, ids, document, scale)
            masses, key_states, value_states = _memories(call, z, keys, values)
            call.output(masses, key_states, value_states, out)()
        return out, masses.boundary[:, :, -1].clone(), key_states[:, :, -1].clone(), value_states[:, :, -1].clone()

    @staticmethod
    def backward(ctx: Any, dout: Optional, dz: Optional, dkeys: Optional, dvalues: Optional) -> Any:
        q, k, v, s, z, keys, values, ids, document = ctx.saved_tensors
        dout = q.new_zeros((*q.shape[:3], v.shape[3])) if dout is None else dense(dout)
        dkeys, dvalues = (
            torch.zeros_like(x) if d is None else d.contiguous() for d, x in ((dkeys, keys), (dvalues, values))
        )
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        ds = torch.empty(s.shape, dtype=torch.float32, device=s.device)
        with on_device(q.device):
            call = _call(q, k, v, s, ids, document, ctx.scale)
            masses, key_states, value_states = _memories(call, z, keys, values)
            fall = (dkeys * key_states[:, :, -1]).sum(-1) + (dvalues * value_states[:, :, -1]).sum(-1)
            fall = fall if dz is None else fall - dz
            rows, reads = call.queries(masses, key_states, value_states, dout, dq)
            rows()
            of_keys = _gradients(call, call.q, reads.g, masses, dkeys)
            of_values = _gradients(call, dout, reads.p, masses, dvalues)
            of_masses = _gradients(call, call.ones(q.shape[1]), reads.c, masses, fall[..., None].contiguous())
            call.keys(call.k, call.q, reads.g, masses, of_keys, dk)()
            call.keys(call.v, dout, reads.p, masses, of_values, dv)()
            call.control(call.k, call.q, reads.g, masses, of_keys, ds, first=True)()
            call.control(call.v, dout, reads.p, masses, of_values, ds, first=False)()
            call.mass(reads.c, masses, of_masses, ds)()
        dkeys, dvalues, fall = of_keys[:, :, 0].clone(), of_values[:, :, 0].clone(), of_masses[:, :, 0, :, 0]
        dz = (dkeys * keys).sum(-1) + (dvalues * values).sum(-1) - fall
        return dq, dk, dv, ds.to(s.dtype), dz, dkeys, dvalues, None, None, None


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    ids: Optional,
    document: Optional,
    scale: float,
) -> Causal:
    given = dense(q), dense(k), dense(v), dense(s), scale
    made = Causal(*given, None, arch(q.device))
    return made if ids is None else Causal(*given, documents_of(ids, document, made.chunk), made.arch)


def _memories(call: Causal, z: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Any:
    """(the log masses, the keys' memory and the values' before each chunk and after the last)."""
    launches, masses = call.masses(z.contiguous())
    for launch in launches:
        launch()
    found = []
    for x, start in ((call.k, keys), (call.v, values)):
        launch, states = call.write(x, masses)
        launch()
        call.scan(states, start.contiguous(), masses, down=False)()
        found.append(states)
    return masses, *found


def _gradients(call: Causal, x: torch.Tensor, y: torch.Tensor, masses: Masses, last: torch.Tensor) -> torch.Tensor:
    """The gradient of a memory at each boundary, from that at the end."""
    launch, states = call.write(x, masses, y)
    launch()
    call.scan(states, last, masses, down=True)()
    return states
