"""Sizes derived from a configuration: world, mesh, accumulation, lengths. Arithmetic only."""

from __future__ import annotations

from pydantic import Field

from longctx.config.architecture import parameter_count
from longctx.config.fields import Section
from longctx.config.schema import RunConfig
from longctx.config.sections.mesh import MeshSizes
from longctx.config.sections.train import TrainSection
from longctx.config.topology import ulysses_limits, weights_group
from longctx.config.ulysses import UNKNOWN_LIMITS
from longctx.errors import ConfigError
from longctx.layout import get_layout
from longctx.world import launched_world

CPU_RANKS = 2


class Derived(Section):
    """Sizes of a run that no key sets directly."""

    world: int = Field(description="ranks in total")
    ring: int = Field(description="ranks that share one sequence by ring attention")
    ulysses: int = Field(description="ranks that share one sequence by all-to-all of heads")
    data: int = Field(description="replicas")
    micro_batch: int = Field(description="rows in one forward and backward of one replica")
    accumulation: int = Field(description="micro-batches per optimizer step")
    global_batch: int = Field(description="rows per optimizer step")
    padded_length: int = Field(description="tokens per row, padded so that every rank holds equally many")
    local_length: int = Field(description="tokens per row and rank")
    tokens_per_step: int = Field(description="tokens per optimizer step, without padding")
    group: int | None = Field(
        description="ranks per secondary shard group of ZeRO-3's weights (hpZ); None: no secondary copy"
    )
    parameters: int | None = Field(description="approximate parameter count; None if unknown before loading")


def world_size(config: RunConfig, default: int = CPU_RANKS) -> int:
    """Return the number of ranks: as launched, as `mesh` sets it, else `default` or what the mesh needs.

    Args:
        default: ranks that this machine starts by default (one per GPU, or 2 on the CPU).
    """
    launched, _ = launched_world()
    if launched is not None:
        return launched
    mesh = config.mesh
    if mesh.world != "auto":
        return mesh.world
    known = [size for size in (mesh.ring, mesh.ulysses, mesh.data) if isinstance(size, int)]
    product = 1
    for size in known:
        product *= size
    if len(known) == 3 or product > default:
        return product
    return default


def mesh_sizes(config: RunConfig, world: int) -> MeshSizes:
    """Return ring, ulysses and data in a world of ``world`` ranks, every `auto` filled in.

    Raises:
        ConfigError: the mesh does not fill the world.
    """
    mesh = config.mesh
    return mesh.sizes(world, ulysses_limits(config, world) if mesh.ulysses == "auto" else UNKNOWN_LIMITS)


def accumulation_of(train: TrainSection, replicas: int) -> int:
    """Return the micro-batches per optimizer step: global_batch / (micro_batch x replicas).

    Raises:
        ConfigError: the result is not a whole number.
    """
    at_once = train.micro_batch * replicas
    rows = at_once if train.global_batch is None else train.global_batch
    if rows % at_once:
        below, above = rows // at_once * at_once, -(-rows // at_once) * at_once
        near = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"global_batch {rows} is not a multiple of micro_batch {train.micro_batch} x data {replicas} = {at_once}; "
            f"write {near}"
        )
    return rows // at_once


def derive(config: RunConfig, world: int | None = None) -> Derived:
    """Return the sizes of a run of ``world`` ranks (None: see ``world_size``).

    Raises:
        ConfigError: the mesh does not fill the world, or the batch cannot be split over it.
    """
    world = world_size(config) if world is None else world
    train, length = config.train, config.data.sequence_length
    grid = mesh_sizes(config, world)
    accumulation = accumulation_of(train, grid.data)
    global_batch = accumulation * train.micro_batch * grid.data
    padded = get_layout(config.attention.layout).padded_length(length, grid.ring, grid.ulysses)
    return Derived(
        world=grid.world,
        ring=grid.ring,
        ulysses=grid.ulysses,
        data=grid.data,
        micro_batch=train.micro_batch,
        accumulation=accumulation,
        global_batch=global_batch,
        padded_length=padded,
        local_length=padded // (grid.ring * grid.ulysses),
        tokens_per_step=global_batch * length,
        group=weights_group(config, world),
        parameters=parameter_count(config),
    )
