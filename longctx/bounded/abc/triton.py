"""Causal ABC with the prefix normalizer by the Triton kernels: `abc/chunks.py` on a GPU or interpreted.

Only the inputs are saved; backward recomputes masses and states. Importing this file imports triton, so it is imported
when that backend is chosen.
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.attention.backends.triton import arch, dense, on_device
from longctx.bounded.abc.chunks import ABCTensors
from longctx.bounded.shared_triton import empty_like, output_gradient, state_gradient, with_documents
from longctx.derivative import first_only
from longctx.kernels.abc.fused import Causal, Masses

Optional = torch.Tensor | None


@first_only
class FusedABC(torch.autograd.Function):
    """(scale, *ABCTensors) -> (out, z, keys, values after the last token): one control for keys and values."""

    @staticmethod
    def forward(ctx: Any, scale: float, *tensors: Optional) -> tuple[torch.Tensor, ...]:
        x = ABCTensors(*tensors)  # type: ignore[arg-type]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.scale = scale
        out = torch.empty((*x.q.shape[:3], x.v.shape[3]), dtype=x.q.dtype, device=x.q.device)
        with on_device(x.q.device):
            call = _call(x, scale)
            masses, keys, values = _states(call, x)
            call.output(masses, keys, values, out).run()
        return out, masses.boundary[:, :, -1].clone(), keys[:, :, -1].clone(), values[:, :, -1].clone()

    @staticmethod
    def backward(ctx: Any, dout: Optional, dz: Optional, dkeys: Optional, dvalues: Optional) -> Any:
        x = ABCTensors(*ctx.saved_tensors)
        dout = output_gradient(dout, x.q, x.v)
        dkeys, dvalues = state_gradient(dkeys, x.keys), state_gradient(dvalues, x.values)
        dq, dk, dv = empty_like(x.q, x.k, x.v)
        ds = torch.empty(x.s_k.shape, dtype=torch.float32, device=x.s_k.device)
        with on_device(x.q.device):
            call = _call(x, ctx.scale)
            masses, keys, values = _states(call, x)
            # How much the loss falls as the last log mass grows: the last state is a mean, divided by that mass.
            gain = (dkeys * keys[:, :, -1]).sum(-1) + (dvalues * values[:, :, -1]).sum(-1)
            gain = gain if dz is None else gain - dz
            rows, reads = call.queries(masses, keys, values, dout, dq)
            rows.run()
            of_keys = _state_gradients(call, call.q, reads.g, masses, dkeys)
            of_values = _state_gradients(call, dout, reads.p, masses, dvalues)
            of_masses = _state_gradients(
                call, call.ones(x.q.shape[1]), reads.c, masses, gain[..., None].contiguous()
            )  # fmt: skip
            call.keys(call.k, call.q, reads.g, masses, of_keys, dk).run()
            call.keys(call.v, dout, reads.p, masses, of_values, dv).run()
            call.control(call.k, call.q, reads.g, masses, of_keys, ds, first=True).run()
            call.control(call.v, dout, reads.p, masses, of_values, ds, first=False).run()
            call.mass(reads.c, masses, of_masses, ds).run()
        dkeys, dvalues, gain = of_keys[:, :, 0].clone(), of_values[:, :, 0].clone(), of_masses[:, :, 0, :, 0]
        dz = (dkeys * x.keys).sum(-1) + (dvalues * x.values).sum(-1) - gain
        return None, dq, dk, dv, ds.to(x.s_k.dtype), None, dz, None, dkeys, dvalues, None, None


def _call(x: ABCTensors, scale: float) -> Causal:
    inputs = dense(x.q), dense(x.k), dense(x.v), dense(x.s_k), scale
    return with_documents(lambda documents: Causal(*inputs, documents, arch(x.q.device)), x.ids, x.document)


def _states(call: Causal, x: ABCTensors) -> tuple[Masses, torch.Tensor, torch.Tensor]:
    """Return the log masses, and the states of keys and of values before each chunk and after the last."""
    launches, masses = call.masses(x.z_k.contiguous())
    for launch in launches:
        launch.run()
    found = []
    for tokens, start in ((call.k, x.keys), (call.v, x.values)):
        launch, states = call.write(tokens, masses)
        launch.run()
        call.scan(states, start.contiguous(), masses, down=False).run()
        found.append(states)
    return masses, found[0], found[1]


def _state_gradients(
    call: Causal, x: torch.Tensor, y: torch.Tensor, masses: Masses, last: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of a state at each chunk boundary, from that at the end."""
    launch, states = call.write(x, masses, y)
    launch.run()
    call.scan(states, last, masses, down=True).run()
    return states
