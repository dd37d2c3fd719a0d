"""DeepSpeed Ulysses: DistributedAttention's all-to-alls around torch's attention on whole rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.peers import Contestant, Step, by_autograd, contiguous


def load() -> Step:
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.init_distributed("gloo")

    def local(q, k, v):  # type: ignore[no-untyped-def]  # (B, S, H/ranks, D), DeepSpeed's layout
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    layer = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return layer(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0).transpose(1, 2)

    return by_autograd(attention)


CONTESTANT = Contestant("DeepSpeed Ulysses", "deepspeed", "0.19.8", load, contiguous)
