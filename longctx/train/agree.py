"""Small talk between all ranks: exchange JSON, and fail together.

A rank that raises alone leaves the others waiting in their next collective. Whatever one rank may find out by itself
(a full disk, a damaged file) goes through ``together``, so that all ranks raise or none does. Values travel as JSON
bytes in tensors: torch's object collectives would unpickle what arrives.
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
    """Return (rank, world size); (0, 1) where torch.distributed does not run."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def device() -> torch.device:
    """Return where tensors of a collective must live."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def gather_json(value: Any) -> list[Any]:
    """Return every rank's ``value``, by rank. All ranks must call it."""
    _, world = ranks()
    if world == 1:
        return [json.loads(json.dumps(value))]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device())
    lengths = [torch.zeros(1, dtype=torch.int64, device=data.device) for _ in range(world)]
    dist.all_gather(lengths, torch.tensor([len(data)], device=data.device))
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8, device=data.device)
    padded[: len(data)] = data
    rows = [torch.zeros_like(padded) for _ in range(world)]
    dist.all_gather(rows, padded)
    return [json.loads(bytes(row[: int(n)].tolist())) for row, n in zip(rows, lengths, strict=True)]


def broadcast_json(value: Any) -> Any:
    """Return rank 0's ``value`` on every rank."""
    return gather_json(value if ranks()[0] == 0 else None)[0]


def gather_floats(values: list[float]) -> torch.Tensor:
    """Return every rank's numbers as one float64 tensor (world, len(values)) on the CPU, in one collective."""
    _, world = ranks()
    mine = torch.tensor(values, dtype=torch.float64, device=device())
    if world == 1:
        return mine[None].cpu()
    rows = [torch.zeros_like(mine) for _ in range(world)]
    dist.all_gather(rows, mine)
    return torch.stack(rows).cpu()


@contextmanager
def together() -> Iterator[None]:
    """Run a block that may fail on some ranks; afterwards every rank raises if any did.

    The block must not contain a collective. A rank that did not fail raises the first failing rank's error.
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
