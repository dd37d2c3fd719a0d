"""longctx's own entry in the attention rows: ring_attention as a user calls it."""

from __future__ import annotations

import torch

from benchmarks.peers import Contestant, Step, by_autograd, zigzag


def load() -> Step:
    import longctx

    mesh = longctx.Mesh(ring=torch.distributed.get_world_size())

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return longctx.ring_attention(q, k, v, mesh=mesh, causal=True, layout="zigzag")

    return by_autograd(attention)


CONTESTANT = Contestant("longctx ring", "longctx", None, load, zigzag)
