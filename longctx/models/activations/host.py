"""HostStore: offload the activations that checkpointed layers save for backward to pinned host memory.

At a million tokens layer inputs take most of a GPU's memory, and are not used for seconds. They are copied to the host
while the next layer computes, and prefetched while backward of the layer above ends. Copies run on their own streams;
the compute stream waits only for a copy that is late.

``record_stream`` is not used: it frees memory only once the host has seen that a copy is done, and the host runs far
ahead of the GPU. Instead an offloaded tensor is held for one more layer, after which the compute stream waits for its
copy and the memory is freed in stream order. A prefetched tensor is allocated on the compute stream.

The prefetch starts when the attention of the layer above has its gradients: memory peaks before that point, and the
rest of that layer's backward, the gradients of three projections, takes about as long as the copy. For the same reason
a layer's own input is freed once the layer has been recomputed from it, and fetched again at that point.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from longctx.nn.saved import register_source

LEAST_BYTES = 1 << 16  # offloading smaller tensors is not worth the copy


class Offloaded:
    """A tensor in host memory, and its copy on the device once it is prefetched."""

    def __init__(self, store: HostStore, host: torch.Tensor, device: torch.device, copied_out: Any) -> None:
        self.host, self.device, self.copied_out = host, device, copied_out  # event after the copy to the host
        self.store, self.layer = store, store.layers
        self.on_device: torch.Tensor | None = None  # allocated; complete after `copied_in`
        self.copied_in: Any = None  # event after the copy to the device
        self.stream: Any = None  # compute stream that `on_device` was allocated on
        self.taken = False
        self.needed_in_backward = False  # used a second time, after the recomputation, through `result`
        self._again: torch.Tensor | None = None

    def result(self) -> torch.Tensor:
        """Return the tensor in backward, for operators that did not save it themselves (``longctx.nn.saved``)."""
        if self._again is None:
            self._again = self.store.take(self)
        return self._again

    def __del__(self) -> None:
        # Prefetched but never taken: its memory must not be reused before the copy into it is done.
        if self.on_device is not None and self.stream is not None:
            self.stream.wait_event(self.copied_in)


class _Recording(threading.local):
    """The store of the layer whose forward runs in this thread, if its activations are offloaded."""

    store: HostStore | None = None


_recording = _Recording()


class HostStore:
    """Keep tensors of any shape and dtype in host memory between forward and backward; one store per model.

    Args:
        everything: also copy small tensors and CPU tensors, to test the store without a GPU.
    """

    def __init__(self, *, everything: bool = False) -> None:
        self.everything = everything
        self.order: list[weakref.ref[Offloaded]] = []  # weak: autograd owns them, so a dropped graph frees them
        self.layers = 0
        self.leaving: list[tuple[int, torch.Tensor, Any]] = []  # (layer, tensor, event after its copy to the host)
        self._out: dict[torch.device, Any] = {}
        self._back: dict[torch.device, Any] = {}

    @contextlib.contextmanager
    def layer(self) -> Iterator[None]:
        """Tensors that are put within the block belong to one layer, and are fetched together."""
        self.layers += 1
        self._free_before(self.layers - 1)
        before, _recording.store = _recording.store, self
        try:
            yield
        finally:
            _recording.store = before

    def put(self, tensor: torch.Tensor) -> torch.Tensor | Offloaded:
        """Start copying ``tensor`` to the host; return a handle for ``take``, or a small or CPU tensor unchanged."""
        tensor = tensor.detach()
        small = tensor.nbytes < LEAST_BYTES or tensor.device.type != "cuda"
        if small and not self.everything:
            return tensor
        offloaded = self._copy_out(tensor)
        self.order.append(weakref.ref(offloaded))
        return offloaded

    def take(self, kept: torch.Tensor | Offloaded) -> torch.Tensor:
        """Return the tensor on its device, and start fetching the other tensors of its layer."""
        if isinstance(kept, torch.Tensor):
            return kept
        self._free_before(self.layers + 1)  # backward has begun: no layer will put another tensor, so free all
        self._fetch(kept)
        self.fetch(kept.layer)
        tensor, kept.on_device, kept.taken = kept.on_device, None, True
        assert tensor is not None
        if kept.copied_in is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.copied_in)
            kept.stream = None
        return tensor

    def put_input(self, tensor: torch.Tensor) -> torch.Tensor | Offloaded:
        """As ``put``, for a layer's input: its first norm then need not save it but gets it from the store."""
        kept = self.put(tensor)
        if isinstance(kept, Offloaded):
            register_source(tensor, kept)
        return kept

    def take_input(self, kept: torch.Tensor | Offloaded) -> torch.Tensor:
        """As ``take``, for what ``put_input`` returned; the layer is recomputed from it."""
        tensor = self.take(kept)
        if isinstance(kept, Offloaded):
            register_source(tensor, kept)
        return tensor

    def fetch(self, layer: int) -> None:
        """Start fetching a layer's tensors that were not taken yet; forget those of later layers."""
        waiting = [found for found in (ref() for ref in self.order) if found is not None]
        for offloaded in waiting:
            if offloaded.layer == layer and not offloaded.taken:
                self._fetch(offloaded)
        self.order = [weakref.ref(offloaded) for offloaded in waiting if offloaded.layer <= layer]

    def fetch_again(self, layer: int) -> None:
        """Start fetching what a layer uses a second time: its input, which was freed after the recomputation."""
        for offloaded in (ref() for ref in self.order):
            if offloaded is not None and offloaded.layer == layer and offloaded.taken and offloaded.needed_in_backward:
                self._fetch(offloaded)

    def _free_before(self, layer: int) -> None:
        """Free the tensors that layers before ``layer`` have offloaded, in stream order after their copies."""
        for owner, tensor, copied_out in self.leaving:
            if owner < layer and copied_out is not None:
                torch.cuda.current_stream(tensor.device).wait_event(copied_out)
        self.leaving = [held for held in self.leaving if held[0] >= layer]

    def _copy_out(self, tensor: torch.Tensor) -> Offloaded:
        if tensor.device.type != "cuda":
            host, copied_out = tensor.clone(), None
        else:
            side = _stream(self._out, tensor.device)
            side.wait_stream(torch.cuda.current_stream(tensor.device))  # the tensor must be computed first
            with torch.cuda.stream(side):
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                copied_out = side.record_event()
        self.leaving.append((self.layers, tensor, copied_out))
        return Offloaded(self, host, tensor.device, copied_out)

    def _fetch(self, offloaded: Offloaded) -> None:
        if offloaded.on_device is not None:
            return
        if offloaded.copied_out is None:
            offloaded.on_device = offloaded.host.clone()
            return
        # Allocated on the compute stream, where it is freed. The copy waits until that stream has reached this point,
        # and until the copy to the host is done.
        side, offloaded.stream = _stream(self._back, offloaded.device), torch.cuda.current_stream(offloaded.device)
        offloaded.on_device = torch.empty_like(offloaded.host, device=offloaded.device)
        side.wait_stream(offloaded.stream)
        side.wait_event(offloaded.copied_out)
        with torch.cuda.stream(side):
            offloaded.on_device.copy_(offloaded.host, non_blocking=True)
            offloaded.copied_in = side.record_event()


def fetch_ahead(query: torch.Tensor) -> None:
    """In a layer with offloaded activations, register the prefetch: once ``query`` has its gradient, fetch the layer's
    input again, and the tensors of the layer before."""
    store = _recording.store
    if store is not None and query.requires_grad:
        query.register_hook(partial(_fetch_next, store, store.layers))


def _fetch_next(store: HostStore, layer: int, gradient: torch.Tensor) -> None:
    store.fetch_again(layer)
    store.fetch(layer - 1)


def _stream(known: dict[torch.device, Any], device: torch.device) -> Any:
    """Return the device's copy stream, created on first use."""
    if device not in known:
        known[device] = torch.cuda.Stream(device)
    return known[device]
