"""recompute_norms: a transformers model whose RMSNorms keep their input for backward and nothing else.

transformers writes a norm as a chain of operations in fp32. For autograd that is the input in fp32, the normalised
input and 1/rms, and (for whoever comes next) the result; it all follows from the input, which is mostly there anyway.
The projections of attention and a tiled MLP, which come next, have the result made anew as well.
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

# Backward has a chain of fp32 tensors of each tile at once, 28 bytes a number: counted as 32 widths, it stays small.
_WIDTHS = 32
_ATTENTION = re.compile(r"(Attention|Attn)$")
_NORM = re.compile(r"RMSNorm$")  # torch's layer_norm keeps no more than its input already


def recompute_norms(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Have every RMSNorm of ``model`` keep only its input (..., D) and make the rest anew in backward, in place; and
    the linears of its attention not keep what a norm gives them.

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
    for projection in _projections(model) if found else ():
        projection.forward = MethodType(_projected, projection)  # type: ignore[method-assign]
    return found


@cache
def _recomputing(kind: Any) -> Any:
    plain = kind.forward

    @wraps(plain)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():  # a compiler fuses the chain, and decides itself what to keep
            return plain(self, x)
        tile = choose_tile("auto", _WIDTHS * x.shape[-1], x.device)
        norm, parameters = MethodType(plain, self), list(self.parameters())
        again = partial(_again, norm, tile, [(p, p.detach().clone()) for p in parameters if hasattr(p, "ds_id")])
        return tiled(norm, x, parameters, tile, again=again)

    return forward


def _again(norm: Any, tile: int, values: list[tuple[Any, torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    """norm(x) in backward. ZeRO-3 has its weights gathered for its own backward, not for that of those who come next:
    ``values`` are what they were."""
    there = [parameter.data for parameter, _ in values]
    try:
        for parameter, value in values:
            parameter.data = value
        return in_tiles(norm, x, tile)
    finally:
        for (parameter, _), data in zip(values, there, strict=True):
            parameter.data = data


def _projections(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """The linears right below attention modules, unless somebody has changed them."""
    attentions = [module for module in model.modules() if _ATTENTION.search(type(module).__name__)]
    children = (child for module in attentions for child in module.children())
    return [child for child in children if type(child) is torch.nn.Linear and "forward" not in vars(child)]


def _projected(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, self.weight, self.bias)


def _takes_one(module: torch.nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2
