"""Rules that depend on the number of ranks: mesh, ZeRO groups, row length and batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from longctx.config.derived import accumulation_of, mesh_sizes
from longctx.config.findings import Finding, Rule
from longctx.config.schema import RunConfig
from longctx.engine.settings import parts_of
from longctx.errors import ConfigError


def rules_of(world: int) -> list[Rule]:
    """Return the rules for a world of ``world`` ranks."""
    return [partial(rule, world=world) for rule in (_world, _group, _mesh, _length, _batch)]


def _world(config: RunConfig, world: int) -> Iterator[Finding]:
    size = config.mesh.world
    if size not in ("auto", world):
        yield Finding("mesh.world", f"got {size}, but the launcher started {world} ranks; remove the key", "mesh")


def _group(config: RunConfig, world: int) -> Iterator[Finding]:
    group = config.zero.group
    if isinstance(group, int) and (group >= world or world % group) and _agreed(config, world):
        yield Finding("zero.group", f"got {group}; {parts_of(world)}", "zero-group")


def _mesh(config: RunConfig, world: int) -> Iterator[Finding]:
    mesh = config.mesh
    if not _agreed(config, world):
        return
    try:
        mesh_sizes(config, world)
    except ConfigError as error:
        key = next((name for name in ("ring", "data", "world", "ulysses") if name in mesh.model_fields_set), "ring")
        yield Finding(f"mesh.{key}", str(error).removeprefix("mesh: "), "mesh")


def _length(config: RunConfig, world: int) -> Iterator[Finding]:
    length, layout = config.data.sequence_length, config.attention.layout
    if not _fills(config, world):
        return
    sizes = mesh_sizes(config, world)
    least = sizes.ring * sizes.ulysses * (2 if layout == "zigzag" else 1)
    if length < least:
        message = f"got {length}; ring {sizes.ring} with layout {layout} needs rows of at least {least} tokens"
        yield Finding("data.sequence_length", message, "length")


def _batch(config: RunConfig, world: int) -> Iterator[Finding]:
    if not _fills(config, world):
        return
    try:
        accumulation_of(config.train, mesh_sizes(config, world).data)
    except ConfigError as error:
        yield Finding("train.global_batch", str(error).removeprefix("global_batch "), "batch")


def _agreed(config: RunConfig, world: int) -> bool:
    """Whether `mesh.world` is auto, or the number of ranks that were started."""
    return config.mesh.world in ("auto", world)


def _fills(config: RunConfig, world: int) -> bool:
    """Whether the mesh fills the world; otherwise no other size can be derived."""
    if not _agreed(config, world):
        return False
    try:
        mesh_sizes(config, world)
    except ConfigError:
        return False
    return True
