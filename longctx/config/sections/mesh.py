"""`mesh:` how ranks are arranged: world = data x ring x ulysses."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field

from longctx.config.fields import AutoInt, Section
from longctx.config.ulysses import UNKNOWN_LIMITS, UlyssesLimits, choose_ulysses
from longctx.errors import ConfigError


class MeshSizes(NamedTuple):
    """Sizes of the mesh, every `auto` filled in."""

    ring: int
    ulysses: int
    data: int

    @property
    def world(self) -> int:
        """Ranks in total."""
        return self.ring * self.ulysses * self.data


class MeshSection(Section):
    """The grid of ranks. One sequence is sharded over ring x ulysses ranks; data is the number of replicas."""

    ring: AutoInt = Field(
        "auto",
        description="ranks that share one sequence by ring attention; auto: the ranks that `data` and `ulysses` leave",
    )
    ulysses: AutoInt = Field(
        1,
        description="ranks that share one sequence by all-to-all of heads (Ulysses), at most as many as query heads; "
        "auto: as many as fit in one host and divide the heads (docs/hybrid.md); `ring` takes the rest",
    )
    data: AutoInt = Field(
        "auto",
        description="replicas, each with its own sequences; auto: world / (ring x ulysses), and 1 if ring is auto too",
    )
    world: AutoInt = Field(
        "auto", description="ranks in total; auto: what the launcher started, else one per GPU, else 2 CPU processes"
    )

    def sizes(self, world: int, limits: UlyssesLimits = UNKNOWN_LIMITS) -> MeshSizes:
        """Fill in `auto` for a world of `world` ranks.

        Args:
            limits: upper bounds of `ulysses: auto`.

        Raises:
            ConfigError: ring x ulysses x data cannot be `world`.
        """
        known_ring, known_data = (None if size == "auto" else size for size in (self.ring, self.data))
        if self.ulysses == "auto":
            rest = max(world // ((known_ring or 1) * (known_data or 1)), 1)
            ulysses = rest if known_ring and known_data else choose_ulysses(rest, limits)
        else:
            ulysses = self.ulysses
        if known_ring is None:
            data = known_data or 1
            ring = max(world // (data * ulysses), 1)
        else:
            ring = known_ring
            data = known_data or max(world // (ring * ulysses), 1)
        grid = MeshSizes(ring, ulysses, data)
        if grid.world != world:
            raise ConfigError(
                f"mesh: ring {ring} x ulysses {ulysses} x data {data} is {grid.world} ranks, but the world has "
                f"{world}; choose sizes whose product is {world}, or set mesh.world: {grid.world}"
            )
        return grid
