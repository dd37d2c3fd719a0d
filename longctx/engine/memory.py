"""What a training step may keep in memory: the choices of `initialize(memory=…)`, put into a model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any

from longctx.errors import EngineError
from longctx.models.activations.host import HostStore
from longctx.models.activations.loss import tile_loss, why_not_tiled
from longctx.models.activations.mlp import find_mlps, tile_mlps
from longctx.models.activations.norms import recompute_norms
from longctx.models.activations.recompute import Policy, recompute_layers
from longctx.models.hook.wrapped import inner_model
from longctx.nn.entropy import Backend
from longctx.nn.tiling import Tile

logger = logging.getLogger(__name__)
_WHOLE = 2**62  # tokens: one tile


@dataclass(frozen=True)
class Memory:
    """How a model saves memory in training. The default is to leave it as it is.

    Attributes:
        loss_tile: tokens whose logits exist at once; "auto" chooses, and leaves models alone whose loss it cannot tile;
            None never tiles.
        loss_backend: "triton", "torch" or "auto", see ``longctx.nn.tiled_loss``.
        z_loss: weight of PaLM's auxiliary loss lse² in training; needs a tiled loss.
        mlp_tile: tokens that an MLP computes at once, forward and backward; "auto" is half as many as the hidden size,
            and leaves alone models whose MLPs it cannot tile; None never tiles.
        recompute: what backward computes anew: "none"; "mlp", the inner results of MLPs; "layer", everything but a
            layer's input; "layer_keep_attention", that without attention, so that no hop of the ring is repeated.
        offload_checkpoints: what ``recompute`` keeps of layers waits for backward in (pinned) host memory, copied while
            the GPU computes.
        recompute_norms: RMSNorms keep only their input, and make what their gradient needs of it anew.
    """

    loss_tile: Tile | None = None
    loss_backend: Backend = "auto"
    z_loss: float = 0.0
    mlp_tile: Tile | None = None
    recompute: Policy = "none"
    offload_checkpoints: bool = False
    recompute_norms: bool = False


def read_memory(given: Memory | dict[str, Any] | None) -> Memory:
    """Return a ``Memory`` from what a caller passed.

    Raises:
        EngineError: an unknown name.
    """
    if isinstance(given, Memory):
        return given
    names = [field.name for field in fields(Memory)]
    if given is not None and not isinstance(given, dict):
        raise EngineError(f"memory={given!r}: give a dictionary with some of {', '.join(names)}")
    for name in given or {}:
        if name not in names:
            raise EngineError(f"memory: {name!r} is unknown; it has {', '.join(names)}")
    return Memory(**(given or {}))


def save_memory(model: Any, memory: Memory, *, announce: bool = True) -> None:
    """Put the choices of ``memory`` into a transformers model, in place, before DeepSpeed sees it.

    Args:
        announce: say what "auto" could not do (on one rank).

    Raises:
        ModelError: the model cannot do what was asked for by more than "auto".
    """
    if memory.loss_tile is None and memory.z_loss:
        raise EngineError(f"z_loss={memory.z_loss} is part of the tiled loss: set loss_tile, to 'auto' for example")
    inner = inner_model(model)
    if memory.loss_tile is not None:
        reason = why_not_tiled(inner) if memory.loss_tile == "auto" and not memory.z_loss else None
        if reason is None:
            tile_loss(inner, memory.loss_tile, z_loss=memory.z_loss, backend=memory.loss_backend)
        elif announce:
            logger.warning("the loss is not tiled: %s. All of a rank's logits will exist at once", reason)
    if memory.recompute_norms and not recompute_norms(model) and announce:
        logger.warning("recompute_norms does nothing: %s has no RMSNorm", type(model).__name__)
    recompute_layers(inner, memory.recompute, HostStore() if memory.offload_checkpoints else None)
    if memory.recompute == "mlp":
        _make_leaves(tile_mlps(model, _WHOLE if memory.mlp_tile is None else memory.mlp_tile))
    elif memory.mlp_tile is not None:
        if memory.mlp_tile != "auto" or find_mlps(model)[0]:
            _make_leaves(tile_mlps(model, memory.mlp_tile))
        elif announce:
            logger.warning("MLPs are not tiled: %s has no plain ones", type(model).__name__)


def _make_leaves(modules: list[Any]) -> None:
    """Have ZeRO-3 gather each module's weights once, when it is entered, however often it calls its children."""
    from deepspeed.utils import set_z3_leaf_module

    for module in modules:
        set_z3_leaf_module(module, True)
