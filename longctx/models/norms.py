"""recompute_norms: a transformers model whose RMSNorms keep their input for backward and nothing else.

transformers writes a norm as a chain of operations in fp32. For autograd that is the input in fp32, the normalised
input and 1/rms, and (for whoever comes next) the result; it all follows from the input, which is mostly there anyway.
"""

from __future__ import annotations

import inspect
import re
from functools import cache, wraps
from types import MethodType
from typing import Any

import torch

from longctx.nn.tiling import choose_tile
from longctx.nn.tokenwise import tiled

# Backward has a chain of fp32 tensors of each tile at once, 28 bytes a number: counted as 32 widths, it stays small.
_WIDTHS = 32
_NORM = re.compile(r"RMSNorm$")  # torch's layer_norm keeps no more than its input already


def recompute_norms(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Have every RMSNorm of ``model`` keep only its input (..., D) and make the rest anew in backward, in place.

    Results are those of the model's own code to the last bit, and so are gradients of inputs. A weight's gradient is
    summed over tiles of tokens in fp32 (fp64 for fp64).

    Returns:
        The norms; empty where the model has none that takes one tensor.
    """
    found = [
        module
        for module in model.modules()
        if _NORM.search(type(module).__name__) and not any(module.children()) and _takes_one(module)
    ]
    for module in found:
        kind: Any = type(module)
        module.forward = MethodType(_recomputing(kind), module)
    return found


@cache
def _recomputing(kind: Any) -> Any:
    plain = kind.forward

    @wraps(plain)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        tile = choose_tile("auto", _WIDTHS * x.shape[-1], x.device)
        return tiled(MethodType(plain, self), x, list(self.parameters()), tile)

    return forward


def _takes_one(module: torch.nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2
