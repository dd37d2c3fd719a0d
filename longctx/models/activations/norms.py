"""recompute_norms: make a transformers model's RMSNorms save only their input for backward.

transformers implements a norm as a chain of fp32 operations. Autograd saves the fp32 input, the normalised input and
1/rms, and the next operator saves the norm's output. All of it can be recomputed from the input, which is usually saved
anyway. The next operators, projections of attention or a tiled MLP, have the norm's output recomputed as well.
"""

from __future__ import annotations

import inspect
import re
from functools import cache, partial, wraps
from types import MethodType
from typing import Any

import torch

from longctx.nn.linear import linear
from longctx.nn.tiling import choose_tile
from longctx.nn.tokenwise import in_tiles, tiled

# Backward holds a tile's chain of fp32 tensors, 28 bytes per element; choose_tile counts it as 32 × width.
_WIDTHS = 32
_ATTENTION = re.compile(r"(Attention|Attn)$")
_NORM = re.compile(r"RMSNorm$")  # torch's layer_norm saves no more than its input anyway


def recompute_norms(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Make every RMSNorm of ``model`` save only its input (..., D) and recompute the rest in backward, in place.

    The linears of attention then do not save the norm's output either. Outputs and gradients of inputs are bitwise
    those of the model's own code. A weight's gradient is summed over tiles of tokens in fp32 (fp64 for fp64).

    Returns:
        the norms; empty if the model has none that takes one tensor.
    """
    found = [
        module
        for module in model.modules()
        if _NORM.search(type(module).__name__) and not any(module.children()) and _takes_one(module)
    ]
    for module in found:
        kind: Any = type(module)
        module.forward = MethodType(_recomputing(kind), module)
    for projection in _projections(model) if found else ():
        projection.forward = MethodType(_projected, projection)  # type: ignore[method-assign]
    return found


@cache
def _recomputing(kind: Any) -> Any:
    plain = kind.forward

    @wraps(plain)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():  # a compiler fuses the chain, and decides itself what to save
            return plain(self, x)
        tile = choose_tile("auto", _WIDTHS * x.shape[-1], x.device)
        norm, parameters = MethodType(plain, self), list(self.parameters())
        again = partial(_again, norm, tile, [(p, p.detach().clone()) for p in parameters if hasattr(p, "ds_id")])
        return tiled(norm, x, parameters, tile, again=again)

    return forward


def _again(norm: Any, tile: int, values: list[tuple[Any, torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    """Recompute norm(x) in the backward of a later operator.

    ZeRO-3 gathers a norm's weights for the norm's own backward only, so they are set to the ``values`` of forward.
    """
    there = [parameter.data for parameter, _ in values]
    try:
        for parameter, value in values:
            parameter.data = value
        return in_tiles(norm, x, tile)
    finally:
        for (parameter, _), data in zip(values, there, strict=True):
            parameter.data = data


def _projections(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """Return the unmodified linears that are direct children of attention modules."""
    attentions = [module for module in model.modules() if _ATTENTION.search(type(module).__name__)]
    children = (child for module in attentions for child in module.children())
    return [child for child in children if type(child) is torch.nn.Linear and "forward" not in vars(child)]


def _projected(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, self.weight, self.bias)


def _takes_one(module: torch.nn.Module) -> bool:
    """Return whether forward takes self and one tensor, and nothing else."""
    return len(inspect.signature(type(module).forward).parameters) == 2
