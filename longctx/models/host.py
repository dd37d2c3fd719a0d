"""HostStore: what checkpointed layers keep waits for backward in host memory instead of the GPU's.

At a million tokens the inputs of layers are most of what a GPU holds, and nobody needs them for seconds. They are
copied out while the next layer computes and back while a later layer's backward does, on streams of their own,
through pinned memory; the computing stream only ever waits for a copy that is late.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

LEAST_BYTES = 1 << 16  # smaller tensors cost more to move than they free
AHEAD = 2  # tensors fetched before they are asked for: a layer's input and its attention's result


class Parked:
    """A tensor in host memory, and on its way back once somebody fetches it."""

    def __init__(self, host: torch.Tensor, device: torch.device, left: Any) -> None:
        self.host, self.device, self.left = host, device, left  # left: event after the copy out
        self.coming: torch.Tensor | None = None
        self.arrived: Any = None


class HostStore:
    """Keep tensors on the host between forward and backward; one for a model.

    Args:
        everything: copy small tensors and those of the CPU as well, to try it where there is no GPU.
    """

    def __init__(self, *, everything: bool = False) -> None:
        self.everything = everything
        self.order: list[weakref.ref[Parked]] = []  # autograd owns what is parked: a dropped graph frees it
        self._out: dict[torch.device, Any] = {}
        self._back: dict[torch.device, Any] = {}

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
        """Return the tensor where it was, and start to fetch those that backward wants next."""
        if isinstance(kept, torch.Tensor):
            return kept
        self._fetch(kept)
        for before in self._before(kept):
            self._fetch(before)
        assert kept.coming is not None
        if kept.arrived is not None:
            stream = torch.cuda.current_stream(kept.device)
            stream.wait_event(kept.arrived)
            kept.coming.record_stream(stream)  # its memory is not given to another copy while it is read
        return kept.coming

    def _before(self, parked: Parked) -> list[Parked]:
        """Return the last that were parked before this one, nearest first; forget it and what came after it."""
        waiting = [found for found in (ref() for ref in self.order) if found is not None]
        if parked in waiting:  # not when it is taken a second time (retain_graph)
            waiting = waiting[: waiting.index(parked)]
        self.order = [weakref.ref(found) for found in waiting]
        return waiting[-AHEAD:][::-1]

    def _copy_out(self, tensor: torch.Tensor) -> Parked:
        if tensor.device.type != "cuda":
            return Parked(tensor.clone(), tensor.device, None)
        side = _stream(self._out, tensor.device)
        side.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(side):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            tensor.record_stream(side)
            left = side.record_event()
        return Parked(host, tensor.device, left)

    def _fetch(self, parked: Parked) -> None:
        if parked.coming is not None:
            return
        if parked.left is None:
            parked.coming = parked.host.clone()
            return
        side = _stream(self._back, parked.device)
        side.wait_event(parked.left)
        with torch.cuda.stream(side):
            parked.coming = parked.host.to(parked.device, non_blocking=True)
            parked.arrived = side.record_event()


def _stream(known: dict[torch.device, Any], device: torch.device) -> Any:
    """The device's stream for copies, made the first time."""
    if device not in known:
        known[device] = torch.cuda.Stream(device)
    return known[device]
