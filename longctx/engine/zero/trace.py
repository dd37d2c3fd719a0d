"""Clear ZeRO-3's cached release decisions whenever it discards its recorded module order.

ZeRO-3 records the order in which modules run, and keeps gathered weights that are used again soon. Which weights to
free after each module is cached forever, even if the recorded order turns out wrong and is recorded again. A forward
pass without gradients before the first step (an evaluation, our probe of positions) records an order in which no weight
is used twice; with the stale cache, weights would be freed after every forward and gathered again in backward.
"""

from __future__ import annotations

from typing import Any

_CACHED = "_PartitionedParameterCoordinator__params_to_release"


def forget_with_trace(optimizer: Any) -> None:
    """Make a ZeRO-3 optimizer's coordinator clear that cache with every order that it discards; ignore other stages."""
    if not hasattr(optimizer, "parameter_offload"):
        return
    coordinator = optimizer.parameter_offload.get_param_coordinator()
    invalidate = coordinator._invalidate_trace
    # The cache is in the closure of the decorator around the method, which has no cache_clear of its own.
    cells = getattr(getattr(type(coordinator), _CACHED, None), "__closure__", None) or ()
    caches = [cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "cache_clear")]

    def invalidate_and_forget() -> None:
        invalidate()
        for cache in caches:
            cache.cache_clear()

    coordinator._invalidate_trace = invalidate_and_forget


def forget_order(engine: Any) -> None:
    """Make ZeRO-3 record the order of modules again, after a forward pass that ran other modules than training does."""
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    coordinator = None if offload is None else offload.get_param_coordinator()
    if coordinator is not None and not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
