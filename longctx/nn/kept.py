"""Kept: what backward gets of a function of tokens: its input, kept once, and its result, made anew from that.

A norm's result is kept by whoever multiplies it with weights, beside the norm's own input. Here the next in line asks
the norm for it instead (`kept_of`), and backward makes it once for all who ask.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class Kept:
    """The input of a function in backward, and its result if ``make`` says how.

    A checkpoint hands out a saved tensor only once; here everybody gets it, until the function's own backward, which is
    the last to want it, calls ``release``.
    """

    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self.node: Any = None  # of autograd's graph: it has the input
        self.make = make
        self._input: torch.Tensor | None = None
        self._result: torch.Tensor | None = None

    def input(self) -> torch.Tensor:
        """Return the input; in backward only."""
        if self._input is None:
            self._input = self.node.saved_tensors[0].detach()
        return self._input

    def result(self) -> torch.Tensor:
        """Return the result, made anew; in backward only."""
        if self._result is None:
            assert self.make is not None
            with torch.no_grad():
                self._result = self.make(self.input())
        return self._result

    def release(self) -> None:
        """Let both go."""
        self._input = self._result = None


def keep(x: torch.Tensor, kept: Kept) -> torch.Tensor:
    """Return x, which a node of autograd's graph keeps for ``kept``."""
    out: torch.Tensor = _Keep.apply(x, kept)
    return out


class _Keep(torch.autograd.Function):
    """x -> x, which it keeps for the node behind it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: Kept) -> torch.Tensor:
        ctx.save_for_backward(x)
        kept.node = ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dx, None


# Results are known by their memory: hooks of modules (DeepSpeed's) hand on other tensor objects than they were given.


class _Known(threading.local):
    def __init__(self) -> None:
        self.results: dict[int, tuple[StorageWeakRef, int, weakref.ref[Kept]]] = {}


_known = _Known()


def makes(result: torch.Tensor, kept: Kept) -> None:
    """Let those who are given ``result`` find whom to ask for it in backward."""
    for key in [key for key, (storage, *_) in _known.results.items() if storage.expired()]:
        del _known.results[key]
    storage = StorageWeakRef(result.untyped_storage())
    _known.results[storage.cdata] = storage, result._version, weakref.ref(kept)


def kept_of(x: torch.Tensor) -> Kept | None:
    """Return who makes x in backward, in whatever shape; None if nobody does: it is no such result, a part of one, or
    changed since. Nor under autocast, whose results are of another dtype, nor in what a compiler traces."""
    if torch.compiler.is_compiling():
        return None
    if not _known.results or not x.requires_grad or not torch.is_grad_enabled():
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    storage = StorageWeakRef(x.untyped_storage())
    found = _known.results.get(storage.cdata)
    if found is None or found[0].expired():
        return None
    _, version, kept = found
    whole = x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes()
    return kept() if whole and x._version == version else None
