"""Offload checkpoints without a GPU, so that what a device would hold can be measured on a CPU."""

from __future__ import annotations

import numpy
import torch

from longctx.models.activations.host import HostStore, Parked


class Elsewhere(HostStore):
    """Move a CPU's tensors to memory that torch did not allocate: its profiler sees them go and return."""

    def __init__(self) -> None:
        super().__init__(everything=True)

    def _copy_out(self, tensor: torch.Tensor) -> Parked:
        away = torch.from_numpy(numpy.empty(tensor.nbytes, numpy.uint8)).view(tensor.dtype).view(tensor.shape)
        self.leaving.append((self.layers, tensor, None))
        return Parked(self, away.copy_(tensor), tensor.device, None)
