"""What follows from a configuration: the world, the grid, accumulation, lengths. Arithmetic only."""

from __future__ import annotations

from pydantic import Field

from longctx.config.architecture import parameter_count
from longctx.config.fields import Section
from longctx.config.schema import RunConfig
from longctx.config.topology import ulysses_limits, weights_group
from longctx.errors import ConfigError
from longctx.layout import get_layout
from longctx.mesh import _discover as launched_world

CPU_RANKS = 2


class Derived(Section):
    """Sizes of a run that no key gives directly."""

    world: int = Field(description="ranks in all")
    ring: int = Field(description="ranks that pass keys and values of one sequence around")
    ulysses: int = Field(description="ranks that exchange heads of one sequence")
    data: int = Field(description="replicas")
    micro_batch: int = Field(description="rows in one forward of one replica")
    accumulation: int = Field(description="micro-batches of one optimizer step")
    global_batch: int = Field(description="rows of one optimizer step")
    padded_length: int = Field(description="tokens of a row after padding, so that every rank holds as many")
    local_length: int = Field(description="tokens of a row on one rank")
    tokens_per_step: int = Field(description="tokens of one optimizer step, without padding")
    group: int | None = Field(description="ranks among which ZeRO-3's weights are cut once more; None: no such copy")
    parameters: int | None = Field(
        description="parameters of the model, about; None where they are not known before loading"
    )


def world_size(config: RunConfig, default: int = CPU_RANKS) -> int:
    """Return how many ranks the run has: as launched, as `mesh` says, else `default` or what the ring needs.

    Args:
        default: ranks this machine would start by itself (one per GPU, or 2 on the CPU).
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


def derive(config: RunConfig, world: int | None = None) -> Derived:
    """Return the sizes of a run of ``world`` ranks (found out when None).

    Raises:
        ConfigError: the mesh does not fill the world, or the batch cannot be split over it.
    """
    world = world_size(config) if world is None else world
    grid = config.mesh.sizes(world, ulysses_limits(config, world))
    train, length = config.train, config.data.sequence_length
    at_once = train.micro_batch * grid.data
    global_batch = at_once if train.global_batch is None else train.global_batch
    if global_batch % at_once:
        below, above = global_batch // at_once * at_once, -(-global_batch // at_once) * at_once
        near = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"global_batch {global_batch} is not a multiple of micro_batch {train.micro_batch} x data {grid.data} = "
            f"{at_once}; write {near}"
        )
    padded = get_layout(config.attention.layout).padded_length(length, grid.ring, grid.ulysses)
    return Derived(
        world=grid.world,
        ring=grid.ring,
        ulysses=grid.ulysses,
        data=grid.data,
        micro_batch=train.micro_batch,
        accumulation=global_batch // at_once,
        global_batch=global_batch,
        padded_length=padded,
        local_length=padded // (grid.ring * grid.ulysses),
        tokens_per_step=global_batch * length,
        group=weights_group(config, world),
        parameters=parameter_count(config),
    )
