"""tile_mlps: make the MLPs of a transformers model compute one tile of tokens at a time."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache, wraps
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

from longctx.errors import ModelError
from longctx.nn.gated import Gated
from longctx.nn.tiling import Tile, choose_tile
from longctx.nn.tokenwise import tiled

_MLP = re.compile(r"(MLP|Mlp|FeedForward|FFN)$")
_SPARSE = re.compile(r"Router|Experts?$|SparseM|M[oO][eE]$|MoeBlock$")  # routed MLPs: the weights depend on the token
_SETTINGS = "longctx_tiled_mlp"
_MIN_TILE = 128  # tokens: smaller products would not fill a matrix unit


def find_mlps(model: torch.nn.Module) -> tuple[list[torch.nn.Module], list[str]]:
    """Return the outermost dense MLPs of ``model``, and the class names of mixture-of-experts blocks."""
    plain: list[torch.nn.Module] = []
    sparse: set[str] = set()
    for module in _outermost(model):
        if any(_SPARSE.search(type(part).__name__) for part in module.modules()):
            sparse.add(type(module).__name__)
        else:
            plain.append(module)
    return plain, sorted(sparse)


def tile_mlps(model: torch.nn.Module, tile: Tile = "auto") -> list[torch.nn.Module]:
    """Make every MLP of ``model`` compute in tiles and save only its input for backward, in place; return the MLPs.

    Rows that fit into one tile take the same path: otherwise ranks with rows of different lengths would finish the
    gradients of an MLP in different orders, and ZeRO 2 adds gradients by their order (`engine/zero/order.py`).

    Mixture-of-experts blocks are left unchanged. Under ZeRO-3 each MLP must be a leaf module (gathered and reduced
    whole), or every tile would gather its weights again; ``initialize(memory=…)`` sets that.

    Args:
        tile: tokens per tile; "auto" is half the hidden size, but at least 128. From a hidden size of 256 on, a tile's
            intermediates are smaller than the weights.

    Raises:
        ModelError: no MLP found, or only mixture-of-experts blocks.
    """
    choose_tile(tile, 1, torch.device("cpu"))  # raises for an invalid tile
    plain, sparse = find_mlps(model)
    if not plain:
        what = f"its {', '.join(sparse)} routes tokens to experts" if sparse else "it has no module named as an MLP"
        raise ModelError(f"the MLPs of {type(model).__name__} cannot be tiled: {what}. Leave mlp_tile out")
    for module in plain:
        setattr(module, _SETTINGS, tile)
        kind: Any = type(module)
        module.forward = MethodType(_tiled_forward(kind), module)
    return plain


@cache
def _tiled_forward(kind: Any) -> Any:
    plain = kind.forward

    @wraps(plain)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        given = getattr(self, _SETTINGS)
        tile = max(_MIN_TILE, x.shape[-1] // 2) if given == "auto" else given
        draws = self.training and any(
            isinstance(part, torch.nn.Dropout) and part.p > 0 for part in self.modules()
        )  # fmt: skip
        return tiled(MethodType(plain, self), x, list(self.parameters()), tile, random=draws, gated=_gated(self))

    return forward


# classes that compute exactly down_proj(act_fn(gate_proj(x)) * up_proj(x))
_GATED = {
    f"{family}MLP"
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Olmo", "Olmo2", "Olmo3")
}


def _gated(mlp: Any) -> Gated | None:
    """Return the parts of ``mlp`` if it is an unmodified gated MLP, else None."""
    if type(mlp).__name__ not in _GATED:
        return None
    linears = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    backward = _activation_backward(mlp.act_fn)
    if backward is None or any(map(_changed, linears)):
        return None
    return Gated(*linears, mlp.act_fn, backward)


def _changed(linear: torch.nn.Module) -> bool:
    """Return whether it may do more than a plain linear: an adapter, a replaced forward, hooks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(linear) is not torch.nn.Linear or "forward" in vars(linear) or any(vars(linear)[name] for name in hooks)


def _activation_backward(act: Any) -> Any:
    """Return f(dout, x, out), which writes an activation's gradient to ``out``; None for an unknown activation."""
    name, aten = type(act).__name__, torch.ops.aten
    if name in ("SiLUActivation", "SiLU"):
        return lambda dout, x, out: aten.silu_backward.grad_input(dout, x, grad_input=out)
    if name in ("GELUTanh", "GELUActivation"):
        approximate = getattr(getattr(act, "act", None), "keywords", {}).get("approximate")
        approximate = "none" if getattr(act, "act", None) is F.gelu else approximate
        if approximate in ("none", "tanh"):
            return lambda dout, x, out: aten.gelu_backward.grad_input(dout, x, approximate=approximate, grad_input=out)
    return None


def _outermost(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the outermost MLPs that take one tensor, and mixture-of-experts blocks."""
    for child in module.children():
        name = type(child).__name__
        if _MLP.search(name) and any(True for _ in child.parameters()) and _takes_one(child):
            yield child
        elif _SPARSE.search(name):
            yield child
        else:
            yield from _outermost(child)


def _takes_one(module: torch.nn.Module) -> bool:
    """Return whether forward needs one argument besides self."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    # two without a default: self and the input
    return sum(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters) == 2
