"""ring: make a Trainer class whose ranks share sequences."""

from __future__ import annotations

from functools import cache
from typing import Any

import transformers

from longctx.errors import EngineError
from longctx.hf.limits import check_class
from longctx.hf.trainer import RingTrainer


@cache
def ring(trainer: Any) -> Any:
    """Return a subclass of a Trainer class that takes ``mesh=``, ``layout=`` and ``memory=`` (see ``RingTrainer``).

    Args:
        trainer: transformers.Trainer, TRL's SFTTrainer or DPOTrainer, or a class derived from one of them. A class with
            a ``compute_loss`` of its own must say that it is right on a shard by ``ring_loss = True``: it divides a sum
            over ``shift_labels`` (shifted already) by ``num_items_in_batch`` and multiplies it as Trainer's does.

    Raises:
        EngineError: the class computes something over whole rows that would be wrong on a shard.
    """
    if not isinstance(trainer, type) or not issubclass(trainer, transformers.Trainer):
        raise EngineError(f"longctx.hf.ring({trainer!r}): give a subclass of transformers.Trainer")
    if issubclass(trainer, RingTrainer):
        return trainer
    kind = check_class(trainer)
    front: Any = RingTrainer
    if kind == "SFTTrainer":
        from longctx.hf.sft import RingSFT as front
    elif kind == "DPOTrainer":
        from longctx.hf.dpo import RingDPO as front
    doc = f"{trainer.__name__} with ``mesh=``: its rows are sharded over the ranks of the mesh's ring."
    return type(f"Ring{trainer.__name__}", (front, trainer), {"__doc__": doc, "__module__": __name__})
