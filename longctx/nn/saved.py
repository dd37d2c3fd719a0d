"""Save a token-wise function's input once; recompute its output in backward.

A linear saves its input, which is a norm's output, and the norm saves its own input: one tensor more than backward
needs. Here the linear finds the norm that produced its input (`find_source`) and saves a reference to it instead. In
backward the norm recomputes its output once for all linears that need it. The norm's input in turn may have a source of
its own: a layer's input is offloaded to the host (`models/activations/host.py`).
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


class TensorSource(Protocol):
    """A provider of a tensor in backward, so that its users need not save it."""

    needed_in_backward: bool
    """Whether an operator saved the source instead of the tensor: `find_source` sets it, `HostStore.fetch_again` reads
    it."""

    def result(self) -> torch.Tensor:
        """Return the tensor; in backward only."""


class SavedInput:
    """A function's input as saved for backward, and its output if ``recompute`` is given.

    Activation checkpointing returns a saved tensor only once. This object serves all users, until the function's own
    backward, which runs last, calls ``release``.
    """

    def __init__(self, recompute: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self.recompute = recompute
        self.node: Any = None  # the autograd node that saved the input
        self.needed_in_backward = False
        self._input: torch.Tensor | None = None
        self._result: torch.Tensor | None = None

    def input(self) -> torch.Tensor:
        """Return the input; in backward only."""
        if self._input is None:
            self._input = self.node.saved_tensors[0].detach()
        return self._input

    def result(self) -> torch.Tensor:
        """Return the recomputed output; in backward only."""
        if self._result is None:
            assert self.recompute is not None
            with torch.no_grad():
                self._result = self.recompute(self.input())
        return self._result

    def release(self) -> None:
        """Free the input and the recomputed output."""
        self._input = self._result = None


def save_input(x: torch.Tensor, saved: SavedInput) -> torch.Tensor:
    """Return x through an autograd node that saves it for ``saved``."""
    with saving_source(find_source(x)):
        out: torch.Tensor = _Save.apply(x, saved)
    return out


def saving_source(source: TensorSource | None) -> AbstractContextManager[Any]:
    """Return a context in which an autograd function that saves one tensor saves ``source`` instead; None changes
    nothing.

    The graph then holds the source as long as it would hold the tensor, with retain_graph as well.
    """
    return nullcontext() if source is None else saved_tensors_hooks(lambda _: source, lambda source: source.result())


class _Save(torch.autograd.Function):
    """Identity that saves x for the node after it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, saved: SavedInput) -> torch.Tensor:
        ctx.save_for_backward(x)
        saved.node = ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dx, None


# Tensors are recognised by their storage: DeepSpeed's module hooks pass on other tensor objects than they received.
# The table holds weak references only, so it keeps neither activations nor sources alive.


class _Registry(threading.local):
    def __init__(self) -> None:
        self.sources: dict[int, tuple[StorageWeakRef, int, weakref.ref[TensorSource]]] = {}


_registry = _Registry()


def register_source(x: torch.Tensor, source: TensorSource) -> None:
    """Let later users of ``x``, in any shape, find the source that provides it in backward."""
    # A freed storage's address may be reused; drop such entries first.
    for key in [key for key, (storage, *_) in _registry.sources.items() if storage.expired()]:
        del _registry.sources[key]
    storage = StorageWeakRef(x.untyped_storage())
    _registry.sources[storage.cdata] = storage, x._version, weakref.ref(source)


def find_source(x: torch.Tensor) -> TensorSource | None:
    """Return the source that provides x in backward, and mark it as needed.

    Returns:
        None if x is not registered, is a part of what is, or was changed since; also under autocast, whose results have
        another dtype, and while a compiler traces.
    """
    if torch.compiler.is_compiling():
        return None
    if not _registry.sources or not x.requires_grad or not torch.is_grad_enabled():
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    storage = StorageWeakRef(x.untyped_storage())
    found = _registry.sources.get(storage.cdata)
    if found is None or found[0].expired():
        return None
    _, version, reference = found
    source = reference()
    # A recomputed output replaces x only if x is all of it, in its order, and unchanged.
    whole = x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes()
    if source is None or not whole or x._version != version:
        return None
    source.needed_in_backward = True
    return source
