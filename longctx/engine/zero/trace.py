"""Drop what ZeRO-3 has derived from a recorded order of modules whenever it drops the order itself.

ZeRO-3 records in which order modules run, and keeps gathered weights that are used again soon. Which weights to free
after each module is cached without end, also when the order turns out wrong and is recorded again. A forward pass
without gradients before the first step (an evaluation, our probe of positions) leaves such an order: no weight is used
a second time in it. Weights would then be freed after every forward for the rest of the run, and gathered once more in
backward.
"""

from __future__ import annotations

from typing import Any

_CACHED = "_PartitionedParameterCoordinator__params_to_release"


def forget_with_trace(optimizer: Any) -> None:
    """Have the coordinator of a ZeRO-3 optimizer clear that cache with every order it drops; others are left alone."""
    if not hasattr(optimizer, "parameter_offload"):
        return
    coordinator = optimizer.parameter_offload.get_param_coordinator()
    invalidate = coordinator._invalidate_trace
    cells = getattr(getattr(type(coordinator), _CACHED, None), "__closure__", None) or ()
    caches = [cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "cache_clear")]

    def invalidate_and_forget() -> None:
        invalidate()
        for cache in caches:
            cache.cache_clear()

    coordinator._invalidate_trace = invalidate_and_forget
