"""`mesh:` how ranks are arranged: world = data x ring x ulysses."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field

from longctx.config.fields import AutoInt, HumanInt, Section
from longctx.errors import ConfigError


class Grid(NamedTuple):
    """The mesh with every `auto` filled in."""

    ring: int
    ulysses: int
    data: int

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.ring * self.ulysses * self.data


class Mesh(Section):
    """The grid of ranks. One sequence is split over ring x ulysses ranks; data is the number of replicas."""

    ring: AutoInt = Field(
        "auto",
        description="ranks that share one sequence by passing keys and values around; auto: what `data` and `ulysses` "
        "leave",
    )
    ulysses: HumanInt = Field(
        1, ge=1, le=1024, description="ranks that share one sequence by exchanging heads; only 1 is built so far"
    )
    data: AutoInt = Field(
        "auto",
        description="replicas, each with sequences of its own; auto: world / (ring x ulysses), and 1 when ring is auto "
        "too",
    )
    world: AutoInt = Field(
        "auto", description="ranks in all; auto: what the launcher started, else one per GPU, else 2 CPU processes"
    )

    def grid(self, world: int) -> Grid:
        """Fill in `auto` for a world of `world` ranks.

        Raises:
            ConfigError: ring x ulysses x data cannot be `world`.
        """
        if self.ring == "auto":
            data = 1 if self.data == "auto" else self.data
            ring = max(world // (data * self.ulysses), 1)
        else:
            ring = self.ring
            data = max(world // (ring * self.ulysses), 1) if self.data == "auto" else self.data
        grid = Grid(ring, self.ulysses, data)
        if grid.world != world:
            raise ConfigError(
                f"mesh: ring {ring} x ulysses {self.ulysses} x data {data} is {grid.world} ranks, but the world has "
                f"{world}; choose sizes whose product is {world}, or set mesh.world: {grid.world}"
            )
        return grid
