"""Choose the fastest settings that fit, for a model, a row length and a machine.

The search covers only switches that trade memory for time. For each grid and ZeRO stage it tries the recomputation
policies from the fastest on, and takes the first that fits: each policy saves less than the one before and takes
longer. `enumerate_all` tries all settings; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from longctx.errors import ConfigError
from longctx.layout import get_layout
from longctx.plan.limit import fits
from longctx.plan.machines import Machine
from longctx.plan.memory import peak_bytes
from longctx.plan.setup import Recompute, Setup, resolve_loss_tile, resolve_mlp_tile
from longctx.plan.shape import ModelShape
from longctx.plan.speed import speed_of

POLICIES: tuple[Recompute, ...] = ("none", "mlp", "layer_keep_attention", "layer")
"""values of `memory.recompute`; each saves less than the one before, and takes longer"""
SMALL_BUCKET = 50_000_000
EQUAL = 0.99  # of the highest tokens/s: settings above this count as equally fast


@dataclass(frozen=True)
class Choice:
    """Settings and their predicted tokens/s."""

    setup: Setup
    tokens_per_second: float

    @property
    def yaml(self) -> dict[str, str | int | bool]:
        """The settings as overrides of a YAML file."""
        setup = self.setup
        found: dict[str, str | int | bool] = {
            "mesh.ring": setup.ring,
            "mesh.ulysses": setup.ulysses,
            "mesh.data": setup.data,
            "zero.stage": setup.stage,
            "zero.group": setup.group or "none",
            "zero.offload_optimizer": "cpu" if setup.offload_optimizer else "none",
            "memory.recompute": setup.recompute,
            "memory.recompute_norms": setup.recompute_norms,
            "memory.offload_checkpoints": setup.offload_checkpoints,
            "memory.mlp_tile": "none" if setup.mlp_tile is None else setup.mlp_tile,
            "memory.loss_tile": "none" if setup.loss_tile is None else setup.loss_tile,
        }
        if setup.stage:
            found["deepspeed.zero_optimization.reduce_bucket_size"] = setup.bucket
        return found


def choose(
    shape: ModelShape,
    tokens: int,
    machine: Machine,
    world: int,
    *,
    ulysses: bool = True,
    offload_checkpoints: bool = False,
    start: Setup | None = None,
) -> Choice:
    """Return the fastest settings with which rows of ``tokens`` tokens fit on ``world`` devices.

    Among settings within 1 % of the fastest it prefers those without offload, without a copy of the weights, and with
    the lowest peak.

    Args:
        ulysses: allow Ulysses, within a node.
        offload_checkpoints: allow checkpoints in host memory.
        start: the settings that are not searched (rows, accumulation, layout); default: one row per micro-batch.

    Raises:
        ConfigError: nothing fits.
    """
    base = start or Setup(tokens, overlap_comm=True, recompute_norms=True)
    found = []
    for grid in _grids(shape, tokens, machine, world, base, ulysses):
        for state in _states(grid, machine):
            for setup in _policies(shape, state, offload_checkpoints):
                if fits(shape, setup, machine):
                    found.append(Choice(setup, speed_of(shape, setup, machine).tokens_per_second))
                    break
    if not found:
        raise ConfigError(
            f"plan: no settings fit rows of {tokens:,} tokens into {world} x {machine.name}; use more devices or "
            "shorter rows"
        )
    fastest = max(choice.tokens_per_second for choice in found)
    near = [choice for choice in found if choice.tokens_per_second >= EQUAL * fastest]
    return min(near, key=lambda choice: (*_costs(choice.setup), peak_bytes(shape, choice.setup)))


def enumerate_all(
    shape: ModelShape,
    tokens: int,
    machine: Machine,
    world: int,
    *,
    ulysses: bool = True,
    offload_checkpoints: bool = False,
    start: Setup | None = None,
    tiles: tuple[int | None, ...] = (None, 128, 1024, 4096, 32768),
) -> Iterator[Choice]:
    """Yield all settings that fit, with all pairs of ``tiles`` and both bucket sizes. Slow; the reference for
    `choose`."""
    base = start or Setup(tokens, overlap_comm=True, recompute_norms=True)
    for grid in _grids(shape, tokens, machine, world, base, ulysses):
        sharding = list(_sharding(grid, machine))
        options = product(sharding, POLICIES, tiles, tiles, (SMALL_BUCKET, base.bucket), {False, offload_checkpoints})
        for (stage, group, offload), policy, mlp, loss, bucket, host in options:
            setup = replace(
                grid, stage=stage, group=group, offload_optimizer=offload, recompute=policy, mlp_tile=mlp,
                loss_tile=loss, bucket=bucket, offload_checkpoints=host,
            )  # fmt: skip
            if fits(shape, setup, machine):
                yield Choice(setup, speed_of(shape, setup, machine).tokens_per_second)


def _costs(setup: Setup) -> tuple[bool, bool]:
    """Return what to avoid among equally fast settings: offload, and a copy of the weights."""
    return setup.offload_optimizer, setup.group is not None


def _grids(shape: ModelShape, tokens: int, machine: Machine, world: int, base: Setup, ulysses: bool) -> Iterator[Setup]:
    """Yield every data x ring x ulysses grid of the world whose Ulysses groups are within a node and have whole
    heads."""
    layout = get_layout(base.layout)
    for sequence in _divisors(world):
        for members in _divisors(sequence) if ulysses else [1]:
            whole = shape.heads % members == 0
            if members > machine.per_node or not whole or tokens < layout.multiple(sequence // members, members):
                continue
            padded = layout.padded_length(tokens, sequence // members, members)
            ring = sequence // members
            yield replace(base, tokens=padded, ring=ring, ulysses=members, data=world // sequence)


def _sharding(grid: Setup, machine: Machine) -> Iterator[tuple[int, int | None, bool]]:
    """Yield (ZeRO stage, group, offload): with and without a copy of the weights in each node, and the optimizer on the
    host."""
    nodes, rest = divmod(grid.world, machine.per_node)
    copied = [machine.per_node] if nodes > 1 and rest == 0 and machine.per_node > 1 else []
    for stage, offload in product(range(4), (False, True)):
        if not (offload and stage == 0):
            for group in (None, *copied) if stage == 3 else (None,):
                yield stage, group, offload


def _states(grid: Setup, machine: Machine) -> Iterator[Setup]:
    """Yield the grid with every way of sharding, and small buckets."""
    for stage, group, offload in _sharding(grid, machine):
        yield replace(grid, stage=stage, group=group, offload_optimizer=offload, bucket=SMALL_BUCKET)


def _policies(shape: ModelShape, state: Setup, host: bool) -> Iterator[Setup]:
    """Yield the recomputation policies, fastest first. MLPs are tiled from the policy on that recomputes them
    anyway."""
    loss, mlp = resolve_loss_tile("auto", shape, True), resolve_mlp_tile("auto", shape)
    for policy in POLICIES:
        tile = None if policy == "none" else mlp
        yield replace(state, recompute=policy, loss_tile=loss, mlp_tile=tile)
        if host and policy in ("layer_keep_attention", "layer"):
            yield replace(state, recompute=policy, loss_tile=loss, mlp_tile=tile, offload_checkpoints=True)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
