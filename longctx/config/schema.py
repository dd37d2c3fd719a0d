"""RunConfig: the whole YAML as one frozen value. Every section has a file of its own in `sections/`."""

from __future__ import annotations

from pydantic import Field

from longctx.config.fields import Raw, Section
from longctx.config.sections.attention import Attention
from longctx.config.sections.checkpoint import Checkpoint
from longctx.config.sections.data import Data
from longctx.config.sections.mesh import Mesh
from longctx.config.sections.model import Model
from longctx.config.sections.output import Output
from longctx.config.sections.train import Train
from longctx.config.sections.zero import Zero


class RunConfig(Section):
    """A training run. Validated once by `longctx.config.load.load`, then only read."""

    model: Model
    """what is trained"""
    mesh: Mesh = Mesh()
    """how ranks are arranged"""
    attention: Attention = Attention()
    """how attention is computed"""
    data: Data
    """what it is trained on"""
    train: Train
    """the loop"""
    zero: Zero = Zero()
    """what DeepSpeed shards"""
    checkpoint: Checkpoint = Checkpoint()
    """saving and resuming"""
    output: Output
    """the run directory"""
    deepspeed: Raw = Field(default_factory=dict)
    """further keys of DeepSpeed's own configuration, merged in; those that a section above owns are refused"""
