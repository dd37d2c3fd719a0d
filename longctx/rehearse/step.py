"""Run one rank of a large world in a single process, with the real training code, and count what it sends and holds.

torch's fake process group accepts every message and delivers none, so the world may have a thousand ranks without a
second process; `CountingMode` fills the receive buffers with zeros. Results are meaningless, but bytes, messages and
memory are exactly those of the real rank: they depend on the configuration, not on values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.attention.comm import Counters, counters
from longctx.attention.ring import ring_attention
from longctx.bounded.abc.operator import abc_attention
from longctx.bounded.cosine.operator import cosine_attention
from longctx.errors import MeshError
from longctx.mesh import Mesh
from longctx.patched import patched
from longctx.plan.traffic import Layer


@dataclass(frozen=True)
class Rehearsed:
    """What a call sent, and the peak of the bytes that it allocated."""

    sent: Counters
    collectives: dict[str, int]
    """bytes this rank sends in all-gathers ("gathered"), reduce-scatters ("scattered") and all-reduces ("reduced"),
    each as a ring algorithm sends them"""
    peak: int


class CountingMode(TorchDispatchMode):
    """Fill the outputs of collectives with zeros, and count the bytes that this rank sends in them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, kind = func(*args, **(kwargs or {})), func.overloadpacket._qualified_op_name
        if kind in _ARRIVING:
            for x in _tensors(args[0]):
                x.zero_()
            # an all-gather's output, or a reduce-scatter's input, is the whole; the other argument is this rank's
            # shard. A ring sends whole - shard bytes per rank.
            output, input_ = _bytes(args[0]), _bytes(args[1])
            self.sent[_ARRIVING[kind]] += abs(output - input_)
        elif kind == "c10d::allreduce_":
            ranks = dist.ProcessGroup.unbox(args[1]).size()
            self.sent["reduced"] += 2 * _bytes(args[0]) * (ranks - 1) // ranks
        return result


_ARRIVING = {  # collectives (output, input, …): what `Rehearsed.collectives` calls their bytes
    "c10d::allgather_": "gathered",
    "c10d::_allgather_base_": "gathered",
    "c10d::allgather_into_tensor_coalesced_": "gathered",
    "c10d::reduce_scatter_": "scattered",
    "c10d::_reduce_scatter_base_": "scattered",
    "c10d::reduce_scatter_tensor_coalesced_": "scattered",
}


def _received(operations: list[dist.P2POp]) -> list[dist.Work]:
    """Replace `batch_isend_irecv`: receive zeros. Our operators call it where no dispatch mode sees it."""
    for operation in operations:
        if operation.op is dist.irecv:
            operation.tensor.zero_()
    return _batch(operations)


def _exchanged(received: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
    """Replace `all_to_all_single`, likewise."""
    received.zero_()
    return _all_to_all(received, *arguments, **keywords)


_batch, _all_to_all = dist.batch_isend_irecv, dist.all_to_all_single


def _tensors(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, list | tuple):
        for one in found:
            yield from _tensors(one)


def _bytes(found: Any) -> int:
    return sum(x.numel() * x.element_size() for x in _tensors(found))


@contextmanager
def as_rank(rank: int, world: int) -> Iterator[None]:
    """Make this process rank `rank` of a simulated world of `world` ranks, within the block.

    Raises:
        MeshError: torch.distributed is initialized already, or there is no such rank.
    """
    if dist.is_initialized():
        raise MeshError("a rehearsal initializes torch.distributed itself; run it in a new process")
    if not 0 <= rank < world:
        raise MeshError(f"rank {rank} of a world of {world} ranks: give 0 to {world - 1}")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # where torch keeps it; registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with patched(dist, batch_isend_irecv=_received, all_to_all_single=_exchanged):
            yield
    finally:
        dist.destroy_process_group()


def watch(call: Callable[[], Any], *, profiled: bool = True) -> tuple[Any, Rehearsed]:
    """Run `call` and return its result and what it sent; if `profiled`, also its peak bytes (else 0)."""
    counters.reset()
    found: list[Any] = []
    with CountingMode() as counting:
        if profiled:
            peak = held_bytes(lambda: found.append(call()))
        else:
            peak = 0
            found.append(call())
    return found[0], Rehearsed(replace(counters), dict(counting.sent), peak)


def held_bytes(call: Callable[[], Any], mark: int | None = None) -> int:
    """Return the peak of the bytes that `call` allocates on the CPU, from the profiler's memory events.

    Args:
        mark: take the peak only between two allocations of exactly this many bytes, which `call` makes as markers.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = marks = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        marks += event.nbytes() == mark
        if mark is None or (marks == 1 and abs(event.nbytes()) != mark):
            peak = max(peak, held)
    return peak


def rehearse_attention(layer: Layer, rank: int, *, slots: int | None = None) -> tuple[Rehearsed, Rehearsed]:
    """Run one layer's attention as `rank` of its world; return what (forward, backward) sent and held.

    Args:
        layer: tokens, heads, grid, layout and window; small enough for this process's CPU.
        slots: None for ring attention, 0 for Cottention, else the slots of ABC.
    """
    with as_rank(rank, layer.world):
        mesh = Mesh(ring=layer.ring, ulysses=layer.ulysses).connect()
        dtype = {2: torch.bfloat16, 4: torch.float32}[layer.itemsize]

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, requires_grad=True)

        q, k, v = (
            zeros(layer.rows, heads, layer.local, layer.head_dim)
            for heads in (layer.heads, layer.kv_heads, layer.kv_heads)
        )
        dout, where = torch.zeros_like(q), {"mesh": mesh, "layout": layer.layout}
        call: Callable[[], Any]
        if slots is None:
            ids = torch.zeros(layer.rows, layer.local, dtype=torch.int32) if layer.documents else None
            call = lambda: ring_attention(q, k, v, window=layer.window, document_ids=ids, **where)  # type: ignore[arg-type] # noqa: E731
        elif slots:
            control = zeros(layer.rows, layer.kv_heads, layer.local, slots)
            call = lambda: abc_attention(q, k, v, control, **where)  # type: ignore[arg-type] # noqa: E731
        else:
            exponent = zeros(layer.kv_heads)
            call = lambda: cosine_attention(q, k, v, exponent, **where)  # type: ignore[arg-type] # noqa: E731
        out, forward = watch(call)
        _, backward = watch(lambda: torch.autograd.grad(out, (q, k, v), dout))
    return forward, backward
