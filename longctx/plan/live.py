"""Bytes of parameters that ZeRO-3 has gathered: those in use, those about to be, and small ones that stay whole."""

from __future__ import annotations

from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape


def persistent_numbers(shape: ModelShape, setup: Setup) -> int:
    """Numbers of parameters that are too small to be cut (`stage3_param_persistence_threshold`)."""
    attention = [shape.hidden * shape.q_width] * 2 + [shape.hidden * shape.kv_width] * 2
    mlp = [shape.largest_mlp_weight] * (3 if shape.gated else 2)
    small = sum(size for size in (*attention, *mlp, shape.hidden, shape.hidden) if size <= setup.persistent)
    return shape.layers * small + shape.hidden


def resting_bytes(shape: ModelShape, setup: Setup) -> int:
    """Whole parameters between steps: the small ones."""
    return shape.itemsize * persistent_numbers(shape, setup) if setup.stage == 3 else 0


def gathered_bytes(shape: ModelShape, setup: Setup) -> int:
    """Whole parameters that exist at the busiest moment.

    DeepSpeed releases a parameter after use only if what is gathered exceeds `stage3_max_live_parameters` or its next
    use is further than `stage3_max_reuse_distance` away (both 1e9 numbers by default): a small model stays gathered.
    """
    if setup.stage < 3:
        return 0
    at_least = max(shape.layer_weights, shape.embedding) + min(setup.prefetch, shape.parameters)
    return shape.itemsize * min(shape.parameters, max(setup.live, at_least))
