"""Binding: the mesh and layout of a model, stored on each of its modules. One object per model, no global state.

Attributes that longctx sets on a model's modules: `longctx_binding`, `longctx_module_index` (here); `longctx_notes`,
`longctx_checks`, `longctx_hooks` (bounded_layer.py); `longctx_tiled_mlp`, `longctx_tiled_loss` (activations/). On
tensors: `longctx_rule`, the mask's rule (masks.py); `longctx_micro_batch` (engine/step), `longctx_prompt`
(decode/caches). On models that generate: `longctx_el`, `longctx_beams` (generation/).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from longctx.mesh import Mesh
from longctx.models.hook.positions import PositionRule

ATTRIBUTE = "longctx_binding"
_INDEX = "longctx_module_index"


@dataclass(eq=False)
class Binding:
    """Mesh and layout of one model, and what its forward passes have shown so far."""

    mesh: Mesh
    layout: str
    backend: str = "auto"  # of ring_attention
    drops: bool = False  # the model asks for attention dropout in training
    configs: list[Any] = field(default_factory=list)  # every transformers config of the model, nested ones too
    checked: bool = False  # the first forward has been verified
    called: set[int] = field(default_factory=set)  # ids of modules that reached longctx, in a probe or first forward
    rule: PositionRule | None = None  # how the model counts positions, once ``probe`` has measured it
    probe_records: list[torch.Tensor] | None = None  # while a probe runs: each attention's q, k, v, (T, features) fp32
    document_ids: torch.Tensor | None = None  # of the current forward; RoPE needs to know which tokens are padding
    cache: Any = None  # a decode.caches.sharded.ShardedCache during a sharded generation
    handles: list[Any] = field(default_factory=list)  # forward hooks, removed when the model is attached again

    @property
    def sharded(self) -> bool:
        """Whether sequences are sharded over more than one rank."""
        return self.mesh.sequence_size > 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        return self  # a copied model (a weight average, say) keeps its mesh and hooks

    def bind(self, model: torch.nn.Module) -> None:
        """Store this binding on every module, because any of them may call the attention function."""
        for index, module in enumerate(model.modules()):
            setattr(module, ATTRIBUTE, self)
            setattr(module, _INDEX, index)


def binding_of(module: torch.nn.Module) -> Binding | None:
    """Return the binding stored on ``module``, or None for a model that runs on one device."""
    return getattr(module, ATTRIBUTE, None)


def module_index(module: torch.nn.Module) -> int:
    """Return the index of ``module`` among its model's modules, the same on every rank; if unbound, its layer index."""
    return int(getattr(module, _INDEX, getattr(module, "layer_idx", None) or 0))
