"""Checkpoints offloaded where there is no GPU, so that what a device would hold can be measured on a CPU."""

from __future__ import annotations

import numpy
import torch

from longctx.models.activations.host import HostStore, Offloaded


class Elsewhere(HostStore):
    """Keeps a CPU's tensors in memory that is not torch's: its profiler sees them leave and come back, as a GPU's."""

    def __init__(self) -> None:
        super().__init__(everything=True)

    def _copy_out(self, tensor: torch.Tensor) -> Offloaded:
        away = torch.from_numpy(numpy.empty(tensor.nbytes, numpy.uint8)).view(tensor.dtype).view(tensor.shape)
        self.leaving.append((self.layers, tensor, None))
        return Offloaded(self, away.copy_(tensor), tensor.device, None)
