"""Exchange small JSON values between ranks; if one rank fails, all raise.

A rank that raises alone leaves the others waiting in their next collective. Code that may fail on one rank only (a full
disk, a damaged file) runs within ``together``, so that all ranks raise or none does. Values are sent as JSON bytes in
tensors, because torch's object collectives would unpickle what they receive.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from longctx import errors
from longctx.errors import LongctxError


def ranks() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) if torch.distributed is not initialized."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def device() -> torch.device:
    """Return the device that collectives of the default process group need their tensors on."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def gather_json(value: Any) -> list[Any]:
    """Return every rank's ``value``, in rank order. Collective over the world."""
    data = json.dumps(value).encode()
    lengths = [int(length) for length in gather_tensors(torch.tensor(len(data)))]
    return [json.loads(row) for row in gather_bytes(data, lengths)]


def gather_bytes(data: bytes, lengths: list[int]) -> list[bytes]:
    """Return every rank's ``data``, in rank order; ``lengths`` are those of all ranks. Collective over the world."""
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return [bytes(row[:length].tolist()) for row, length in zip(gather_tensors(padded), lengths, strict=True)]


def gather_tensors(mine: torch.Tensor) -> list[torch.Tensor]:
    """Return every rank's tensor on the CPU, in rank order; shape and dtype are the same on all. Collective."""
    _, world = ranks()
    if world == 1:
        return [mine.cpu()]
    mine = mine.to(device())
    rows = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(rows, mine)
    return [row.cpu() for row in rows]


def broadcast_json(value: Any) -> Any:
    """Return rank 0's ``value`` on every rank."""
    return gather_json(value if ranks()[0] == 0 else None)[0]


def gather_floats(values: list[float]) -> torch.Tensor:
    """Return every rank's numbers, (world, len(values)) float64 on the CPU. One collective over the world."""
    return torch.stack(gather_tensors(torch.tensor(values, dtype=torch.float64)))


@contextmanager
def together() -> Iterator[None]:
    """Run a block that may fail on some ranks; afterwards every rank raises if any did. Collective over the world.

    The block itself must not contain a collective. A rank that did not fail raises the first failing rank's error.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    report = None
    if failure is not None:
        report = {"type": type(failure).__name__, "text": str(failure) or type(failure).__name__}
    reports = gather_json(report)
    if failure is not None:
        raise failure
    for rank, other in enumerate(reports):
        if other is not None:
            kind = getattr(errors, other["type"], None)
            if isinstance(kind, type) and issubclass(kind, LongctxError):
                raise kind(other["text"])
            raise LongctxError(f"rank {rank} failed: {other['type']}: {other['text']}")
