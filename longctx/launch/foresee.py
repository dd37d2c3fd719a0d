"""Before a run with stages starts: which of them is predicted not to fit this machine's GPUs."""

from __future__ import annotations

from dataclasses import replace

from longctx.config.derived import Derived
from longctx.config.schema import RunConfig
from longctx.errors import ConfigError
from longctx.launch import hardware


def too_large(config: RunConfig, sizes: Derived) -> list[str]:
    """Return one sentence per stage whose predicted memory exceeds a GPU of this machine.

    Empty for a run of one stage, without a GPU, and for a model that the planner does not know.
    """
    memory = hardware.gpu_bytes() if config.train.stages else None
    if memory is None:
        return []
    from longctx.plan.machines import machine_named
    from longctx.plan.stages import plan_stages

    machine = replace(machine_named("h100"), memory=memory, reserved=0)
    try:
        planned = plan_stages(config, sizes.world, machine)
    except ConfigError:
        return []
    return [
        f"train.stages[{one.stage.number}]: rows of {one.stage.config.data.sequence_length:,} tokens are predicted to "
        f"need {one.peak / 2**30:,.1f} GiB a rank, and a GPU here has {memory / 2**30:,.1f}; `longctx plan` shows what "
        "would lower it"
        for one in planned
        if one.peak > memory
    ]
