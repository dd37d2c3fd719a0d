"""RunConfig: the whole YAML as one frozen value. Every section has a file of its own in `sections/`."""

from __future__ import annotations

from pydantic import Field

from longctx.config.fields import Raw, Section
from longctx.config.sections.attention import Attention
from longctx.config.sections.checkpoint import Checkpoint
from longctx.config.sections.data import Data
from longctx.config.sections.fp16 import FP16
from longctx.config.sections.launch import Launch
from longctx.config.sections.memory import Memory
from longctx.config.sections.mesh import Mesh
from longctx.config.sections.model import Model
from longctx.config.sections.output import Output
from longctx.config.sections.train import Train
from longctx.config.sections.zero import Zero


class RunConfig(Section):
    """A training run. Validated once by `longctx.config.load.load`, then only read."""

    model: Model = Field(description="what is trained")
    mesh: Mesh = Field(Mesh(), description="how ranks are arranged")
    attention: Attention = Field(Attention(), description="how attention is computed")
    data: Data = Field(description="what it is trained on")
    train: Train = Field(description="the loop")
    fp16: FP16 = Field(FP16(), description="the loss scale of runs in fp16")
    memory: Memory = Field(Memory(), description="what a training step keeps in memory")
    zero: Zero = Field(Zero(), description="what DeepSpeed shards")
    checkpoint: Checkpoint = Field(Checkpoint(), description="saving and resuming")
    output: Output = Field(description="the run directory")
    launch: Launch = Field(Launch(), description="how ranks are started, and where")
    deepspeed: Raw = Field(
        default_factory=dict,
        description="further keys of DeepSpeed's own configuration, merged in; those that a section above owns are "
        "refused",
    )
