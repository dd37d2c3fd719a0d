"""What a training step may keep in memory: the choices of `initialize(memory=…)`, put into a model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any

from longctx.errors import EngineError
from longctx.models.loss import tile_loss, why_not_tiled
from longctx.nn.tiling import Tile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Memory:
    """How a model saves memory in training. The default is to leave it as it is.

    Attributes:
        loss_tile: tokens whose logits exist at once; "auto" chooses, and leaves models alone whose loss it cannot tile;
            None never tiles.
        z_loss: weight of PaLM's auxiliary loss lse² in training; needs a tiled loss.
    """

    loss_tile: Tile | None = None
    z_loss: float = 0.0


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
    if memory.loss_tile is not None:
        reason = why_not_tiled(model) if memory.loss_tile == "auto" and not memory.z_loss else None
        if reason is None:
            tile_loss(model, memory.loss_tile, z_loss=memory.z_loss)
        elif announce:
            logger.warning("the loss is not tiled: %s. All of a rank's logits will exist at once", reason)
