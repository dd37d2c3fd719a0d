"""torch's context parallelism: its ring template with the fused CPU operator in place of the CUDA ones.

``context_parallel`` itself has no CPU operator registered; the template beneath it takes any operator, so this is the
ring that torch would run here. Its zigzag ("round robin") load balancing is on.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from benchmarks.peers import Contestant, Step, Tensors, zigzag


def load() -> Step:
    from torch.distributed.tensor.experimental._context_parallel import _attention as template

    forward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    template._cp_options.enable_load_balance = True
    template._cp_options.convert_to_f32 = True
    template.set_rotate_method("alltoall")  # a ring; the default gathers all keys at once

    def forward(q, k, v, is_causal, **kwargs):  # type: ignore[no-untyped-def]
        return forward_op(q, k, v, 0.0, is_causal)

    def backward(query, key, value, out, logsumexp, is_causal, grad_out):  # type: ignore[no-untyped-def]
        return backward_op(grad_out, query, key, value, out, logsumexp, 0.0, is_causal)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad_out: torch.Tensor) -> Tensors:
        group = dist.group.WORLD
        out, lse = template._templated_ring_attention(group, 2, forward, q, k, v, is_causal=True)
        grads = template._templated_ring_attention_backward(
            group, 2, backward, grad_out, "grad_out", q, k, v, out, lse, is_causal=True
        )
        return out, *grads[:3]

    return step


CONTESTANT = Contestant("torch context parallel", "torch", "2.13.0", load, zigzag)
