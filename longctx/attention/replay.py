"""Attention that activation checkpointing does not repeat: its result is kept, and handed out again at recomputation.

A checkpoint runs a layer twice: in forward, and again in backward to have its intermediate results. For attention over
a ring that would be every hop once more, for a result that is small. ``keep_attention`` makes the two contexts that
``torch.utils.checkpoint`` asks for: in the first, (out, lse) of every attention are kept; in the second, the operator
returns them and neither computes nor sends. All around it, autograd sees the same operator both times.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

Result = tuple[torch.Tensor, ...]


class _Active(threading.local):
    """The tape of the checkpointed region that this thread is in; backward of a GPU runs in a thread of its own."""

    tape: list[Result] | None = None
    place: int | None = None  # of the next result to hand out; None while recording


_active = _Active()


def keep_attention() -> tuple[_Region, _Region]:
    """Return (context of a forward, context of its recomputation), sharing what attention returned.

    For ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=keep_attention)``. Kept for each
    attention of the region until its backward is over: out (B, H, T, D) in its dtype, lse (B, H, T) in fp32.
    """
    tape: list[Result] = []
    return _Region(tape, None), _Region(tape, 0)


class _Region:
    """A context that can be entered again, for a second backward of the same graph."""

    def __init__(self, tape: list[Result], place: int | None) -> None:
        self.tape, self.place = tape, place
        self.before: tuple[list[Result] | None, int | None] = (None, None)

    def __enter__(self) -> None:
        self.before = _active.tape, _active.place
        _active.tape, _active.place = self.tape, self.place

    def __exit__(self, *error: object) -> None:
        _active.tape, _active.place = self.before


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
        tape.append(tuple(x.detach() for x in result))
        return result
    _active.place = place + 1
    return tuple(x.detach() for x in tape[place])  # new objects: autograd writes its node onto them
