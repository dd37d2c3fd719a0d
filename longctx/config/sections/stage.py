"""`train.stages:` rows of several lengths, one after another, in one run."""

from __future__ import annotations

from pydantic import Field

from longctx.config.fields import HumanInt, Section
from longctx.config.sections.rope import RopeSection


class StageSection(Section):
    """One stage of a run. The schedule of the learning rate goes over all stages."""

    sequence_length: HumanInt = Field(ge=2, le=2**32, description="tokens per row in this stage")
    steps: HumanInt = Field(ge=1, le=2**40, description="optimizer steps of this stage")
    global_batch: HumanInt | None = Field(
        None, ge=1, le=2**30, description="rows per optimizer step; default: train.global_batch"
    )
    micro_batch: HumanInt | None = Field(
        None, ge=1, le=2**20, description="rows in one forward and backward; default: train.micro_batch"
    )
    lr: float | None = Field(None, gt=0, le=1e3, description="peak learning rate in this stage; default: train.lr")
    rope: RopeSection | None = Field(None, description="rotary positions in this stage; default: model.rope")
