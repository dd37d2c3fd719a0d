"""longctx in the attention rows: ring_attention as a user calls it, on a ring and on a hybrid mesh."""

from __future__ import annotations

import torch

from benchmarks.peers import Contestant, NotMeasured, Step, by_autograd, zigzag

ULYSSES = 2  # members per ring rank


def load(ulysses: int = 1) -> Step:
    import longctx

    mesh = longctx.Mesh(ring=torch.distributed.get_world_size() // ulysses, ulysses=ulysses)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return longctx.ring_attention(q, k, v, mesh=mesh, causal=True, layout="zigzag")

    return by_autograd(attention)


def load_hybrid() -> Step:
    if torch.distributed.get_world_size() < 2 * ULYSSES:
        raise NotMeasured(f"a ring of 2 with ulysses {ULYSSES} takes {2 * ULYSSES} ranks")
    return load(ULYSSES)


def member_tokens(rank: int, ranks: int, length: int) -> torch.Tensor:
    """Return a Ulysses member's tokens: its ring rank's zigzag tokens, split in order."""
    return zigzag(rank // ULYSSES, ranks // ULYSSES, length).chunk(ULYSSES)[rank % ULYSSES]


CONTESTANT = Contestant("longctx ring", "longctx", None, load, zigzag)
HYBRID = Contestant(f"longctx ring x ulysses {ULYSSES}", "longctx", None, load_hybrid, member_tokens)
