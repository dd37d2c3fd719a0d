"""HostStore: what checkpointed layers keep waits for backward in host memory instead of the GPU's.

At a million tokens the inputs of layers are most of what a GPU holds, and nobody needs them for seconds. They are
copied out while the next layer computes and back while the backward of the layer after it ends, on streams of their
own, through pinned memory; the computing stream only ever waits for a copy that is late.

No memory waits for the host to see that a copy is done, as record_stream has it do, which is far ahead of the GPU: what
leaves is held for another layer and then let go behind its copy, on the computing stream; what comes back is allocated
there.

They come back when that layer's attention has its gradients. Until then a step holds most, and what is left of the
layer, the gradients of three projections, takes about as long as the copy. For the same reason a layer's own input,
once the layer has been recomputed from it, is let go until then.
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

LEAST_BYTES = 1 << 16  # smaller tensors cost more to move than they free


class Parked:
    """A tensor in host memory, and on its way back once somebody fetches it."""

    def __init__(self, store: HostStore, host: torch.Tensor, device: torch.device, left: Any) -> None:
        self.host, self.device, self.left = host, device, left  # left: event after the copy out
        self.store, self.layer = store, store.layers
        self.coming: torch.Tensor | None = None
        self.arrived: Any = None
        self.stream: Any = None  # whose memory is coming
        self.taken = False
        self.wanted = False  # a second time, after the recomputation: somebody counts on `result`
        self._again: torch.Tensor | None = None

    def result(self) -> torch.Tensor:
        """Return the tensor, in backward, to those who counted on it (``longctx.nn.saved``)."""
        if self._again is None:
            self._again = self.store.take(self)
        return self._again

    def __del__(self) -> None:
        if self.coming is not None and self.stream is not None:  # nobody has taken it: its memory waits for the copy
            self.stream.wait_event(self.arrived)


class _Recording(threading.local):
    """The layer whose forward runs in this thread, if what it keeps goes to a store."""

    store: HostStore | None = None


_recording = _Recording()


class HostStore:
    """Keep tensors on the host between forward and backward; one for a model.

    Args:
        everything: copy small tensors and those of the CPU as well, to try it where there is no GPU.
    """

    def __init__(self, *, everything: bool = False) -> None:
        self.everything = everything
        self.order: list[weakref.ref[Parked]] = []  # autograd owns what is parked: a dropped graph frees it
        self.layers = 0
        self.leaving: list[tuple[int, torch.Tensor, Any]] = []  # layer, what is copied out, event after the copy
        self._out: dict[torch.device, Any] = {}
        self._back: dict[torch.device, Any] = {}

    @contextlib.contextmanager
    def layer(self) -> Iterator[None]:
        """What is put within belongs to one layer, and is fetched together."""
        self.layers += 1
        self._let_go(self.layers - 1)
        before, _recording.store = _recording.store, self
        try:
            yield
        finally:
            _recording.store = before

    def put(self, tensor: torch.Tensor) -> torch.Tensor | Parked:
        """Start to copy ``tensor`` out; return what ``take`` wants. Small ones and the host's own stay as they are."""
        tensor = tensor.detach()
        small = tensor.nbytes < LEAST_BYTES or tensor.device.type != "cuda"
        if small and not self.everything:
            return tensor
        parked = self._copy_out(tensor)
        self.order.append(weakref.ref(parked))
        return parked

    def take(self, kept: torch.Tensor | Parked) -> torch.Tensor:
        """Return the tensor where it was, and start to fetch what else its layer has kept."""
        if isinstance(kept, torch.Tensor):
            return kept
        self._let_go(self.layers + 1)
        self._fetch(kept)
        self.fetch(kept.layer)
        tensor, kept.coming, kept.taken = kept.coming, None, True
        assert tensor is not None
        if kept.arrived is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.arrived)
            kept.stream = None
        return tensor

    def put_input(self, tensor: torch.Tensor) -> torch.Tensor | Parked:
        """As ``put``, of a layer's input, which its first norm need not keep then: it asks for it here."""
        kept = self.put(tensor)
        if isinstance(kept, Parked):
            register_source(tensor, kept)
        return kept

    def take_input(self, kept: torch.Tensor | Parked) -> torch.Tensor:
        """As ``take``, of what ``put_input`` returned, for the layer's recomputation."""
        tensor = self.take(kept)
        if isinstance(kept, Parked):
            register_source(tensor, kept)
        return tensor

    def fetch(self, layer: int) -> None:
        """Start to fetch what a layer has kept and nobody has taken; forget what came after it."""
        waiting = [found for found in (ref() for ref in self.order) if found is not None]
        for parked in waiting:
            if parked.layer == layer and not parked.taken:
                self._fetch(parked)
        self.order = [weakref.ref(parked) for parked in waiting if parked.layer <= layer]

    def fetch_again(self, layer: int) -> None:
        """Start to fetch what of a layer is wanted a second time: its input, which was not on the device while its
        attention's backward ran."""
        for parked in (ref() for ref in self.order):
            if parked is not None and parked.layer == layer and parked.taken and parked.wanted:
                self._fetch(parked)

    def _let_go(self, layer: int) -> None:
        """Let go what layers before ``layer`` had copied out, behind the copies."""
        for owner, tensor, left in self.leaving:
            if owner < layer and left is not None:
                torch.cuda.current_stream(tensor.device).wait_event(left)
        self.leaving = [held for held in self.leaving if held[0] >= layer]

    def _copy_out(self, tensor: torch.Tensor) -> Parked:
        if tensor.device.type != "cuda":
            host, left = tensor.clone(), None
        else:
            side = _stream(self._out, tensor.device)
            side.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(side):
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                left = side.record_event()
        self.leaving.append((self.layers, tensor, left))
        return Parked(self, host, tensor.device, left)

    def _fetch(self, parked: Parked) -> None:
        if parked.coming is not None:
            return
        if parked.left is None:
            parked.coming = parked.host.clone()
            return
        side, parked.stream = _stream(self._back, parked.device), torch.cuda.current_stream(parked.device)
        parked.coming = torch.empty_like(parked.host, device=parked.device)
        side.wait_stream(parked.stream)
        side.wait_event(parked.left)
        with torch.cuda.stream(side):
            parked.coming.copy_(parked.host, non_blocking=True)
            parked.arrived = side.record_event()


def fetch_ahead(query: torch.Tensor) -> None:
    """Within a layer whose kept tensors go to a store: once ``query`` has its gradient, fetch its input again, and the
    layer before."""
    store = _recording.store
    if store is not None and query.requires_grad:
        query.register_hook(partial(_fetch_next, store, store.layers))


def _fetch_next(store: HostStore, layer: int, gradient: torch.Tensor) -> None:
    store.fetch_again(layer)
    store.fetch(layer - 1)


def _stream(known: dict[torch.device, Any], device: torch.device) -> Any:
    """The device's stream for copies, made the first time."""
    if device not in known:
        known[device] = torch.cuda.Stream(device)
    return known[device]
