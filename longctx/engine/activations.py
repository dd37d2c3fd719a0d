"""Apply the activation-memory settings of `initialize(memory=…)` to a model: tiling, recomputation, offload."""

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
class ActivationSettings:
    """How a model saves activation memory in training. The default leaves it unchanged.

    Attributes:
        loss_tile: tokens per tile of the loss, so many rows of logits exist at once; "auto" chooses, and skips models
            whose loss cannot be tiled; None does not tile.
        loss_backend: "triton", "torch" or "auto", see ``longctx.nn.tiled_loss``.
        z_loss: weight of PaLM's auxiliary loss lse² in training; needs a tiled loss.
        mlp_tile: tokens per tile of an MLP, forward and backward; "auto" is half the hidden size, at least 128, and
            skips models whose MLPs cannot be tiled; None does not tile.
        recompute: what to recompute in backward: "none"; "mlp", MLP intermediates; "layer", whole layers from their
            inputs; "layer_keep_attention", layers without attention, so that no ring hop is repeated.
        offload_checkpoints: keep the layer inputs that ``recompute`` saves in pinned host memory until backward; the
            copies overlap with compute.
        recompute_norms: RMSNorms save only their input and recompute the rest in backward.
    """

    loss_tile: Tile | None = None
    loss_backend: Backend = "auto"
    z_loss: float = 0.0
    mlp_tile: Tile | None = None
    recompute: Policy = "none"
    offload_checkpoints: bool = False
    recompute_norms: bool = False


Memory = ActivationSettings  # its former name


def read_settings(given: ActivationSettings | dict[str, Any] | None) -> ActivationSettings:
    """Return the ``memory`` argument of ``initialize`` as ``ActivationSettings``.

    Raises:
        EngineError: an unknown name.
    """
    if isinstance(given, ActivationSettings):
        return given
    names = [field.name for field in fields(ActivationSettings)]
    if given is not None and not isinstance(given, dict):
        raise EngineError(f"memory={given!r}: give a dictionary with some of {', '.join(names)}")
    for name in given or {}:
        if name not in names:
            raise EngineError(f"memory: {name!r} is unknown; it has {', '.join(names)}")
    return ActivationSettings(**(given or {}))


def apply_settings(model: Any, settings: ActivationSettings, *, announce: bool = True) -> None:
    """Apply ``settings`` to a transformers model, in place, before DeepSpeed wraps it.

    Args:
        announce: log what "auto" had to skip (set it on one rank).

    Raises:
        ModelError: the model does not support a setting that is not "auto".
    """
    if settings.loss_tile is None and settings.z_loss:
        raise EngineError(f"z_loss={settings.z_loss} is part of the tiled loss: set loss_tile, to 'auto' for example")
    inner = inner_model(model)
    if settings.loss_tile is not None:
        reason = why_not_tiled(inner) if settings.loss_tile == "auto" and not settings.z_loss else None
        if reason is None:
            tile_loss(inner, settings.loss_tile, z_loss=settings.z_loss, backend=settings.loss_backend)
        elif announce:
            logger.warning("the loss is not tiled: %s. All of a rank's logits will exist at once", reason)
    if settings.recompute_norms and not recompute_norms(model) and announce:
        logger.warning("recompute_norms does nothing: %s has no RMSNorm", type(model).__name__)
    recompute_layers(inner, settings.recompute, HostStore() if settings.offload_checkpoints else None)
    if settings.recompute == "mlp":
        _make_leaves(tile_mlps(model, _WHOLE if settings.mlp_tile is None else settings.mlp_tile))
    elif settings.mlp_tile is not None:
        if settings.mlp_tile != "auto" or find_mlps(model)[0]:
            _make_leaves(tile_mlps(model, settings.mlp_tile))
        elif announce:
            logger.warning("MLPs are not tiled: %s has no plain ones", type(model).__name__)


def _make_leaves(modules: list[Any]) -> None:
    """Mark modules as ZeRO-3 leaves: their weights are gathered once per call, however often children are called."""
    from deepspeed.utils import set_z3_leaf_module

    for module in modules:
        set_z3_leaf_module(module, True)
