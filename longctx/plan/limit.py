"""Find the longest sequence that fits, and the switches that would make it longer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from longctx.layout import get_layout
from longctx.plan.machines import Machine
from longctx.plan.memory import host_bytes, peak_bytes
from longctx.plan.setup import Setup, resolve_loss_tile, resolve_mlp_tile
from longctx.plan.shape import ModelShape

MOST = 2**34  # tokens; the search ends here


@dataclass(frozen=True)
class Switch:
    """A setting to change, as YAML, with the longest row and the peak bytes after the change."""

    what: str
    longest: int
    peak: int


def fits(shape: ModelShape, setup: Setup, machine: Machine) -> bool:
    """Return whether a rank's peak fits on the device, and a node's offloaded bytes in its host memory."""
    if peak_bytes(shape, setup) > machine.usable:
        return False
    ranks = min(setup.world, machine.per_node)
    return ranks * sum(host_bytes(shape, setup).values()) <= 0.9 * machine.host


def longest(shape: ModelShape, setup: Setup, machine: Machine) -> int:
    """Return the longest row that fits, a multiple of what the layout needs, or 0 if even the shortest does not fit."""
    multiple = get_layout(setup.layout).multiple(setup.ring, setup.ulysses)

    def holds(count: int) -> bool:
        return fits(shape, replace(setup, tokens=count * multiple), machine)

    if not holds(1):
        return 0
    # Double the length until it no longer fits, then bisect to a relative error of 1/2048.
    low, high = 1, 2
    while high * multiple < MOST and holds(high):
        low, high = high, 2 * high
    while high - low > max(low // 2048, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low * multiple


def further(shape: ModelShape, setup: Setup, machine: Machine) -> list[Switch]:
    """Return the switches that would make the longest sequence at least 2 % longer, best first."""
    now = longest(shape, setup, machine)
    found = [
        Switch(what, longest(shape, changed, machine), peak_bytes(shape, changed))
        for what, changed in _switches(shape, setup)
    ]
    return sorted((change for change in found if change.longest > 1.02 * now), key=lambda change: -change.longest)


def _switches(shape: ModelShape, setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Yield every switch that this setup does not use yet."""
    if setup.recompute != "layer_keep_attention":
        yield "memory.recompute: layer_keep_attention", replace(setup, recompute="layer_keep_attention")
    if setup.recompute not in ("none", "layer"):
        yield "memory.recompute: layer (repeats the ring's hops)", replace(setup, recompute="layer")
    if setup.loss_tile is None:
        tile = resolve_loss_tile("auto", shape, setup.on_gpu)
        yield "memory.loss_tile: auto", replace(setup, loss_tile=tile)
    if setup.mlp_tile is None:
        yield "memory.mlp_tile: auto", replace(setup, mlp_tile=resolve_mlp_tile("auto", shape))
    if not setup.recompute_norms:
        yield "memory.recompute_norms: true", replace(setup, recompute_norms=True)
    if setup.stage < 3 and setup.world > 1:
        yield "zero.stage: 3", replace(setup, stage=3)
    if setup.group is not None:
        yield "zero.group: none", replace(setup, group=None)
    if not setup.offload_optimizer and setup.stage > 0:
        yield "zero.offload_optimizer: cpu", replace(setup, offload_optimizer=True)
    small = 50_000_000
    if setup.stage > 0 and setup.bucket > small:
        what = f"deepspeed.zero_optimization.reduce_bucket_size: {small}"
        yield what, replace(setup, bucket=small)
    if setup.stage == 3 and setup.live > 2 * small and shape.parameters > setup.live:
        what = f"deepspeed.zero_optimization.stage3_max_live_parameters: {2 * small}"
        yield what, replace(setup, live=2 * small)
    if not setup.offload_checkpoints and setup.recompute in ("layer", "layer_keep_attention"):
        yield "memory.offload_checkpoints: true", replace(setup, offload_checkpoints=True)
    yield f"mesh.ring: {2 * setup.ring} (twice the devices)", replace(setup, ring=2 * setup.ring)
