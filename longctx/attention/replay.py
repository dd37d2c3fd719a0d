"""Exempt attention from recomputation under activation checkpointing: save its results, and reuse them in backward.

A checkpoint runs a layer twice: in forward, and in backward to recompute its intermediate results. Ring attention would
repeat every hop for a result that is small. ``keep_attention`` returns the two contexts that ``torch.utils.checkpoint``
takes: in the first, (out, lse) of every attention call are saved; in the second, the operator returns them and neither
computes nor sends. Autograd sees the same operator both times.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

Result = tuple[torch.Tensor, ...]


class Store(Protocol):
    """Where results are held until backward, ``longctx.models.activations.host.HostStore`` for example."""

    def put(self, tensor: torch.Tensor) -> Any: ...
    def take(self, kept: Any) -> torch.Tensor: ...


class DeviceStore:
    """Hold results on their device."""

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what ``take`` turns into the tensor again."""
        return tensor.detach()

    def take(self, kept: torch.Tensor) -> torch.Tensor:
        """Return the tensor."""
        return kept


class _Active(threading.local):
    """The tape of the region that this thread is in. Per thread: backward on a GPU runs in a thread of its own."""

    store: Store = DeviceStore()
    tape: list[tuple[Any, ...]] | None = None  # per attention call, in order: what the store returned for each result
    position: int | None = None  # of the next result to reuse; None in forward, which records


_active = _Active()


def keep_attention(store: Store | None = None) -> tuple[_Region, _Region]:
    """Return the contexts of a checkpoint's forward and of its recomputation.

    For ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=keep_attention)``. Per attention call
    of the region, out (B, H, T, D) in its dtype and lse (B, H, T) in fp32 are held until its backward is over.

    Args:
        store: where results are held; on their device if None.
    """
    tape: list[tuple[Any, ...]] = []
    return _Region(store or DeviceStore(), tape, None), _Region(store or DeviceStore(), tape, 0)


class _Region:
    """A context that can be entered repeatedly: once per backward of the same graph."""

    def __init__(self, store: Store, tape: list[tuple[Any, ...]], position: int | None) -> None:
        self.inside = store, tape, position
        self.before: list[Any] = []  # a second backward of the same graph may start within the first

    def __enter__(self) -> None:
        self.before.append((_active.store, _active.tape, _active.position))
        _active.store, _active.tape, _active.position = self.inside

    def __exit__(self, *error: object) -> None:
        _active.store, _active.tape, _active.position = self.before.pop()


def keeping() -> bool:
    """Return whether this thread is in one of ``keep_attention``'s contexts."""
    return _active.tape is not None


def replayed(compute: Callable[[], Result]) -> Result:
    """Return ``compute()``; in ``keep_attention``'s contexts, save its result or return the saved one instead."""
    tape, position = _active.tape, _active.position
    if tape is None:
        return compute()
    if position is None:
        result = compute()
        tape.append(tuple(_active.store.put(x) for x in result))
        return result
    _active.position = position + 1
    return tuple(
        _active.store.take(x).detach() for x in tape[position]
    )  # new objects: autograd writes its node onto them
