"""One rank of a large world, rehearsed in one process: the code that trains runs; what it sends and holds is counted.

torch's fake process group accepts every message and delivers none, so a world may have a thousand ranks and no second
process; `Postman` puts zeros where something was to arrive. Results mean nothing, but bytes, messages and memory are
those of the real rank, exactly, for none of them depends on a value: schedules follow from the configuration alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.attention.comm import Counters, counters
from longctx.attention.ring import ring_attention
from longctx.bounded.abc.operator import abc_attention
from longctx.bounded.cosine.operator import cosine_attention
from longctx.errors import MeshError
from longctx.mesh import Mesh
from longctx.plan.traffic import Layer


@dataclass(frozen=True)
class Seen:
    """What a call sent, and the most bytes that it held at once beyond those that were there before it."""

    sent: Counters
    collectives: dict[str, int]
    """Bytes this rank sends in gathering ("gathered"), scattering and adding up ("scattered", "reduced"), as rings of
    these collectives send them."""
    peak: int


class Postman(TorchDispatchMode):
    """Delivers zeros where a collective was to bring something, and books what this rank sends in it."""

    def __init__(self) -> None:
        super().__init__()
        self.booked: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, kind = func(*args, **(kwargs or {})), func.overloadpacket._qualified_op_name
        if kind in _ARRIVING:
            for x in _tensors(args[0]):
                x.zero_()
            there, here = _bytes(args[0]), _bytes(args[1])
            self.booked[_ARRIVING[kind]] += max(there, here) - min(there, here)
        elif kind == "c10d::allreduce_":
            ranks = dist.ProcessGroup.unbox(args[1]).size()
            self.booked["reduced"] += 2 * _bytes(args[0]) * (ranks - 1) // ranks
        return result


_ARRIVING = {  # operators whose first argument is filled from the second
    "c10d::allgather_": "gathered",
    "c10d::_allgather_base_": "gathered",
    "c10d::allgather_into_tensor_coalesced_": "gathered",
    "c10d::reduce_scatter_": "scattered",
    "c10d::_reduce_scatter_base_": "scattered",
    "c10d::reduce_scatter_tensor_coalesced_": "scattered",
}


def _received(operations: list[dist.P2POp]) -> list[dist.Work]:
    """`batch_isend_irecv` in a world in which zeros arrive; our operators call it from within, where no mode looks."""
    for operation in operations:
        if operation.op is dist.irecv:
            operation.tensor.zero_()
    return _batch(operations)


def _exchanged(received: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
    """`all_to_all_single`, likewise."""
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
        with patch.multiple(dist, batch_isend_irecv=_received, all_to_all_single=_exchanged):
            yield
    finally:
        dist.destroy_process_group()


def watch(call: Callable[[], Any], *, profiled: bool = True) -> tuple[Any, Seen]:
    """Run `call` and return (what it returns, what it sent, and held where it is `profiled`)."""
    counters.reset()
    box: list[Any] = []
    with Postman() as postman:
        if profiled:
            peak = held_bytes(lambda: box.append(call()))
        else:
            peak = 0
            box.append(call())
    return box[0], Seen(replace(counters), dict(postman.booked), peak)


def held_bytes(call: Callable[[], Any], mark: int | None = None) -> int:
    """Return the most bytes that `call` held at once beyond those before it, by the profiler's events. CPU.

    Args:
        mark: count only between two allocations of just so many bytes that `call` makes.
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


def rehearse_attention(layer: Layer, rank: int, *, slots: int | None = None) -> tuple[Seen, Seen]:
    """Run one layer's attention as `rank` of its world; returns (forward, backward).

    Args:
        layer: its tokens, heads, grid, layout and window; small enough for this process's CPU.
        slots: of a bounded memory instead: 0 for Cottention, which has none, else of ABC.
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
