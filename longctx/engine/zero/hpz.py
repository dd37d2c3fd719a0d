"""The ranks among which ZeRO-3's weights are cut once more (`zero_hpz_partition_size`), for each engine its own.

DeepSpeed keeps them in a global of the process and makes them once: an engine made later gets the first one's group
whatever its own configuration says, a model built later fails on it. Here each gets what its configuration asks for,
and equal groups of one world are made once.
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
    """Have engines and models that are made within hold the copy that ``settings`` ask for, or none. Collective."""
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
    """Forget the copies of all weights, once these have been loaded anew; the next forward makes new ones. DeepSpeed
    itself drops those of trained weights, and leaves frozen ones what they were before."""
    for weight in model.parameters():
        if getattr(weight, "ds_secondary_tensor", None) is not None:
            weight.ds_secondary_tensor = None


def check_model(model: Any, settings: Settings) -> None:
    """Refuse a model whose weights were cut otherwise than the engine is told: DeepSpeed would leave them as they are.

    Raises:
        EngineError: it was built with another ``zero_hpz_partition_size``.
    """
    wanted = group_size(settings)
    for weight in model.parameters():
        if not hasattr(weight, "ds_zero_param_process_group"):
            continue  # not cut yet: the engine will
        built = weight.ds_secondary_tensor_group_size if weight.ds_zero_param_process_group is not None else 1
        if built != wanted:
            raise EngineError(
                f"zero_optimization.zero_hpz_partition_size: {wanted}, but the model was built with {built}: give "
                "longctx.build the same configuration"
            )
