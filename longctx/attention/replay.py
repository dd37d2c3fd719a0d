"""Attention that activation checkpointing does not repeat: its result is kept, and handed out again at recomputation.

A checkpoint runs a layer twice: in forward, and again in backward to have its intermediate results. For attention over
a ring that would be every hop once more, for a result that is small. ``keep_attention`` makes the two contexts that
``torch.utils.checkpoint`` asks for: in the first, (out, lse) of every attention are kept; in the second, the operator
returns them and neither computes nor sends. All around it, autograd sees the same operator both times.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

Result = tuple[torch.Tensor, ...]


class Store(Protocol):
    """Where results wait for backward: ``longctx.models.activations.host.HostStore`` for example."""

    def put(self, tensor: torch.Tensor) -> Any: ...
    def take(self, kept: Any) -> torch.Tensor: ...


class Here:
    """Results stay where they are."""

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what ``take`` wants."""
        return tensor.detach()

    def take(self, kept: torch.Tensor) -> torch.Tensor:
        """Return the tensor."""
        return kept


class _Active(threading.local):
    """The tape of the checkpointed region that this thread is in; backward of a GPU runs in a thread of its own."""

    store: Store = Here()
    tape: list[tuple[Any, ...]] | None = None
    place: int | None = None  # of the next result to hand out; None while recording


_active = _Active()


def keep_attention(store: Store | None = None) -> tuple[_Region, _Region]:
    """Return (context of a forward, context of its recomputation), sharing what attention returned.

    Args:
        store: where results wait; on their device when None.

    For ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=keep_attention)``. Kept for each
    attention of the region until its backward is over: out (B, H, T, D) in its dtype, lse (B, H, T) in fp32.
    """
    tape: list[tuple[Any, ...]] = []
    return _Region(store or Here(), tape, None), _Region(store or Here(), tape, 0)


class _Region:
    """A context that can be entered again, for a second backward of the same graph."""

    def __init__(self, store: Store, tape: list[tuple[Any, ...]], place: int | None) -> None:
        self.inside = store, tape, place
        self.before: list[Any] = []  # a second backward of the same graph may start within the first

    def __enter__(self) -> None:
        self.before.append((_active.store, _active.tape, _active.place))
        _active.store, _active.tape, _active.place = self.inside

    def __exit__(self, *error: object) -> None:
        _active.store, _active.tape, _active.place = self.before.pop()


def keeping() -> bool:
    """Whether this thread is within one of ``keep_attention``'s contexts."""
    return _active.tape is not None


def replayed(compute: Callable[[], Result]) -> Result:
    """Return ``compute()``; within ``keep_attention``'s contexts, keep its result or return the kept one instead."""
    tape, place = _active.tape, _active.place
    if tape is None:
        return compute()
    if place is None:
        result = compute()
        tape.append(tuple(_active.store.put(x) for x in result))
        return result
    _active.place = place + 1
    return tuple(_active.store.take(x).detach() for x in tape[place])  # new objects: autograd writes its node onto them
