"""Binding: how an attention module knows its mesh. One object per model, written onto its modules; never a global."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from longctx.mesh import Mesh
from longctx.models.hook.positions import PositionRule

ATTRIBUTE = "longctx_binding"
_PLACE = "longctx_place"


@dataclass(eq=False)
class Binding:
    """The mesh and layout of one model, and what its first forward has shown so far."""

    mesh: Mesh
    layout: str
    backend: str = "auto"  # what computes a block, as ring_attention names it
    drops: bool = False  # the model asks for attention dropout in training
    configs: list[Any] = field(default_factory=list)  # every transformers config of the model, nested ones too
    checked: bool = False  # the first forward has been judged
    called: set[int] = field(default_factory=set)  # id of each module that reached longctx in the first forward
    rule: PositionRule | None = None  # how the model counts positions, once ``probe`` has found out
    seen: list[torch.Tensor] | None = None  # while a probe runs: what each token was in every attention so far
    document_ids: torch.Tensor | None = None  # of the forward in progress; RoPE needs to know which tokens are padding
    cache: Any = None  # a decode.caches.sharded.ShardedCache, while a generation reads the sharded context
    handles: list[Any] = field(default_factory=list)  # forward hooks, to be removed when the model is attached anew

    @property
    def sharded(self) -> bool:
        """More than one rank holds a sequence."""
        return self.mesh.sequence_size > 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        return self  # a copied model (an average of weights, say) stays on the same ranks

    def bind(self, model: torch.nn.Module) -> None:
        """Write this binding onto every module: which of them calls the attention function is the model's choice."""
        for place, module in enumerate(model.modules()):
            setattr(module, ATTRIBUTE, self)
            setattr(module, _PLACE, place)


def binding_of(module: torch.nn.Module) -> Binding | None:
    """Return the binding written onto ``module``, or None for a model that runs on one device."""
    return getattr(module, ATTRIBUTE, None)


def place_of(module: torch.nn.Module) -> int:
    """Return where ``module`` comes among its model's modules, the same on every rank; unbound, its layer's number."""
    return int(getattr(module, _PLACE, getattr(module, "layer_idx", None) or 0))
