"""RunConfig: the whole YAML as one frozen value. Each section has its own file in `sections/`."""

from __future__ import annotations

from pydantic import Field

from longctx.config.fields import Raw, Section
from longctx.config.sections.attention import AttentionSection
from longctx.config.sections.checkpoint import CheckpointSection
from longctx.config.sections.data import DataSection
from longctx.config.sections.fp16 import Fp16Section
from longctx.config.sections.launch import LaunchSection
from longctx.config.sections.memory import MemorySection
from longctx.config.sections.mesh import MeshSection
from longctx.config.sections.model import ModelSection
from longctx.config.sections.output import OutputSection
from longctx.config.sections.train import TrainSection
from longctx.config.sections.zero import ZeroSection


class RunConfig(Section):
    """A training run. Validated once by `longctx.config.load.load`, then only read."""

    model: ModelSection = Field(description="the model to train")
    mesh: MeshSection = Field(MeshSection(), description="how ranks are arranged")
    attention: AttentionSection = Field(AttentionSection(), description="how attention is computed")
    data: DataSection = Field(description="text, tokenizer and packing")
    train: TrainSection = Field(description="the training loop")
    fp16: Fp16Section = Field(Fp16Section(), description="the loss scale of runs in fp16")
    memory: MemorySection = Field(
        MemorySection(), description="how logits and activations are tiled, recomputed and offloaded"
    )
    zero: ZeroSection = Field(ZeroSection(), description="what DeepSpeed shards")
    checkpoint: CheckpointSection = Field(CheckpointSection(), description="saving and resuming")
    output: OutputSection = Field(description="the run directory")
    launch: LaunchSection = Field(LaunchSection(), description="how ranks are started, and where")
    deepspeed: Raw = Field(
        default_factory=dict,
        description="further keys of DeepSpeed's own configuration, merged in; keys that a section above owns are "
        "errors",
    )
