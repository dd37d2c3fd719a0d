"""Kept: what backward gets of a function of tokens: its input, kept once, and its result, made anew from that.

A norm's result is kept by whoever multiplies it with weights, beside the norm's own input. Here the next in line asks
the norm for it instead (`source_of`), and backward makes it once for all who ask. The norm in turn may have its input
from somebody else: a layer's is on the host (`models/activations/host.py`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


class Source(Protocol):
    """Who has a tensor in backward, so that nobody else need keep it."""

    wanted: bool
    """Whether somebody counts on it."""

    def result(self) -> torch.Tensor:
        """Return the tensor; in backward only."""


class Kept:
    """The input of a function in backward, and its result if ``make`` says how.

    A checkpoint hands out a saved tensor only once; here everybody gets it, until the function's own backward, which is
    the last to want it, calls ``release``.
    """

    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self.make = make
        self.node: Any = None  # of autograd's graph: it has the input
        self.wanted = False
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
    with not_kept(source_of(x)):
        out: torch.Tensor = _Keep.apply(x, kept)
    return out


def not_kept(source: Source | None) -> AbstractContextManager[Any]:
    """A context for a function of autograd that saves one tensor: it will have it from ``source``, if there is one.

    The graph then holds the source as long as it would the tensor, through retain_graph too.
    """
    return nullcontext() if source is None else saved_tensors_hooks(lambda _: source, lambda source: source.result())


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


# Tensors are known by their memory: hooks of modules (DeepSpeed's) hand on other objects than they were given.


class _Known(threading.local):
    def __init__(self) -> None:
        self.tensors: dict[int, tuple[StorageWeakRef, int, weakref.ref[Source]]] = {}


_known = _Known()


def know(x: torch.Tensor, source: Source) -> None:
    """Let those who are given ``x``, in whatever shape, find who has it in backward."""
    for key in [key for key, (storage, *_) in _known.tensors.items() if storage.expired()]:
        del _known.tensors[key]
    storage = StorageWeakRef(x.untyped_storage())
    _known.tensors[storage.cdata] = storage, x._version, weakref.ref(source)


def source_of(x: torch.Tensor) -> Source | None:
    """Return who will have x in backward, and may be asked then; None if x is not known, a part of what is, or changed
    since. Nor under autocast, whose results are of another dtype, nor in what a compiler traces."""
    if torch.compiler.is_compiling():
        return None
    if not _known.tensors or not x.requires_grad or not torch.is_grad_enabled():
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    storage = StorageWeakRef(x.untyped_storage())
    found = _known.tensors.get(storage.cdata)
    if found is None or found[0].expired():
        return None
    _, version, reference = found
    source = reference()
    whole = x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes()
    if source is None or not whole or x._version != version:
        return None
    source.wanted = True
    return source
