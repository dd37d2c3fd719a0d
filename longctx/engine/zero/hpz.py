"""Per-engine process groups for ZeRO-3's secondary (hpZ) shards, `zero_hpz_partition_size`.

DeepSpeed creates this group once and keeps it in a global: an engine made later gets the first engine's group whatever
its own configuration says, and a model built later fails. Here each gets the group of its own configuration; groups of
equal size are created once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from longctx.engine.settings import Settings, group_size
from longctx.errors import EngineError
from longctx.patched import patched


@contextmanager
def own_group(settings: Settings) -> Iterator[None]:
    """Give engines and models made in the block the hpZ group of ``settings``, or none. Collective over the world."""
    if (settings.get("zero_optimization") or {}).get("stage", 0) != 3:
        yield
        return
    from deepspeed.utils import groups

    from longctx.rendezvous import neighbours

    def make(size: int) -> None:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = neighbours(size)

    with patched(groups, _ZERO_PARAM_INTRA_PARALLEL_GROUP=None, _create_zero_param_parallel_group=make):
        yield


def drop_copies(model: Any) -> None:
    """Drop the secondary copies of all weights after a checkpoint was loaded; the next forward makes new ones.

    DeepSpeed drops those of trained weights only, and would compute with the old values of frozen ones.
    """
    for weight in model.parameters():
        if getattr(weight, "ds_secondary_tensor", None) is not None:
            weight.ds_secondary_tensor = None


def check_model(model: Any, settings: Settings) -> None:
    """Check that a model was partitioned for the engine's hpZ size; DeepSpeed would keep another one silently.

    Raises:
        EngineError: the model was built with another ``zero_hpz_partition_size``.
    """
    wanted = group_size(settings)
    for weight in model.parameters():
        if not hasattr(weight, "ds_zero_param_process_group"):
            continue  # not partitioned yet: the engine will
        built = weight.ds_secondary_tensor_group_size if weight.ds_zero_param_process_group is not None else 1
        if built != wanted:
            raise EngineError(
                f"zero_optimization.zero_hpz_partition_size: {wanted}, but the model was built with {built}: give "
                "longctx.build the same configuration"
            )
