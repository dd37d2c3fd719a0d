"""One rank of a large world, rehearsed in one process: the code that trains runs, and what it sends and holds is counted.

torch's fake process group accepts every message and delivers none, so a world may have a thousand ranks and no second
process. Values are garbage; bytes, messages and memory are those of the real rank, exactly, for none of them depends on
a value: schedules follow from the configuration alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from longctx.attention.comm import Counters, counters
from longctx.attention.ring import ring_attention
from longctx.errors import MeshError
from longctx.mesh import Mesh
from longctx.plan.cluster import Layer


@dataclass(frozen=True)
class Seen:
    """What a call sent, and the most bytes that it held at once beyond those that were there before it."""

    sent: Counters
    peak: int


@contextmanager
def as_rank(rank: int, world: int) -> Iterator[None]:
    """Be rank `rank` of a world of `world` ranks that does not exist, until the end of the block.

    Raises:
        MeshError: this process belongs to a world already, or there is no such rank.
    """
    if dist.is_initialized():
        raise MeshError("a rehearsal makes a world of its own, and this process is in one; rehearse in a new process")
    if not 0 <= rank < world:
        raise MeshError(f"rank {rank} of a world of {world} ranks: give 0 to {world - 1}")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # where torch keeps it; registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def watch(call: Callable[[], Any]) -> tuple[Any, Seen]:
    """Run `call` and return (what it returns, what it sent and held), from the profiler's events, to the byte. CPU."""
    counters.reset()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, Seen(replace(counters), peak)


def rehearse_attention(layer: Layer, rank: int, window: int | None = None) -> tuple[Seen, Seen]:
    """Run one layer's attention as `rank` of its world; returns (forward, backward).

    Args:
        layer: its tokens, heads, grid and layout; small enough for this process's CPU.
        window: keys that a query sees to its left, itself included.
    """
    with as_rank(rank, layer.world):
        mesh = Mesh(ring=layer.ring, ulysses=layer.ulysses).connect()
        dtype = {2: torch.bfloat16, 4: torch.float32}[layer.itemsize]
        q, k, v = (
            torch.zeros(1, heads, layer.local, layer.head_dim, dtype=dtype, requires_grad=True)
            for heads in (layer.heads, layer.kv_heads, layer.kv_heads)
        )
        dout = torch.zeros_like(q)
        settings: dict[str, Any] = {"mesh": mesh, "layout": layer.layout, "window": window}
        out, forward = watch(lambda: ring_attention(q, k, v, **settings))
        _, backward = watch(lambda: torch.autograd.grad(out, (q, k, v), dout))
    return forward, backward
