"""The stages of a run, each planned as if it were the whole run: a later one may need more memory than the first."""

from __future__ import annotations

from typing import NamedTuple

from longctx.config.derived import Derived, derive
from longctx.config.schema import RunConfig
from longctx.config.stages import RunStage, stages_of
from longctx.plan.limit import fits
from longctx.plan.machines import Machine
from longctx.plan.memory import peak_bytes
from longctx.plan.setup import Setup, setup_of
from longctx.plan.shape import shape_of
from longctx.plan.speed import speed_of


class PlannedStage(NamedTuple):
    """One stage of a run on a machine, predicted."""

    stage: RunStage
    sizes: Derived
    setup: Setup
    peak: int
    """bytes of one rank"""
    fits: bool
    seconds: float
    """of one optimizer step"""

    @property
    def line(self) -> str:
        """The stage in one line, for people."""
        stage, rows = self.stage, self.stage.config.data.sequence_length
        return (
            f"stage {stage.number + 1}  steps {stage.first:,} to {stage.last:,}, {self.sizes.global_batch:,} rows of "
            f"{rows:,} tokens: {self.peak / 2**30:,.2f} GiB a rank, {'fits' if self.fits else 'DOES NOT FIT'}; "
            f"{self.seconds:,.3g} s a step"
        )


def plan_stages(config: RunConfig, world: int, machine: Machine, on_gpu: bool = True) -> list[PlannedStage]:
    """Return a prediction of every stage of a run of ``world`` ranks.

    Raises:
        ConfigError: the planner does not know the model, or the mesh does not fill the world.
    """
    found = []
    for stage in stages_of(config):
        shape, sizes = shape_of(stage.config), derive(stage.config, world)
        setup = setup_of(stage.config, sizes, shape, on_gpu=on_gpu, per_node=machine.per_node)
        seconds = speed_of(shape, setup, machine).total
        found.append(PlannedStage(stage, sizes, setup, peak_bytes(shape, setup), fits(shape, setup, machine), seconds))
    return found
