"""`train:` the training loop: steps, batch, optimizer, schedule, evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from longctx.config.fields import HumanInt, Pair, Section, listed
from longctx.config.sections.stage import StageSection

Stages = Annotated[tuple[StageSection, ...], BeforeValidator(listed, json_schema_input_type=list[StageSection])]


class TrainSection(Section):
    """One optimizer step trains on `global_batch` rows = micro_batch x accumulation x data replicas."""

    steps: HumanInt = Field(ge=1, le=2**40, description="optimizer steps in total; default with `stages`: theirs")
    stages: Stages = Field(
        (),
        max_length=64,
        description="stages of the run, each with rows of its own length: [{sequence_length: 8Ki, steps: 1000}, …]",
    )
    global_batch: HumanInt | None = Field(
        None,
        ge=1,
        le=2**30,
        description="rows per optimizer step over the whole mesh; default: micro_batch x data replicas (no "
        "accumulation)",
    )
    micro_batch: HumanInt = Field(1, ge=1, le=2**20, description="rows in one forward and backward of one replica")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="update rule")
    lr: float = Field(3e-4, gt=0, le=1e3, description="peak learning rate")
    betas: Pair = Field((0.9, 0.95), description="AdamW's two decay rates, each at least 0 and below 1")
    eps: float = Field(1e-8, gt=0, le=1, description="AdamW's epsilon")
    weight_decay: float = Field(
        0.1, ge=0, le=1, description="decoupled weight decay of matrices; vectors (norms, biases) are not decayed"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="SGD's momentum")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="learning-rate schedule after warm-up; it ends at min_lr_ratio x lr"
    )
    warmup_steps: HumanInt = Field(0, ge=0, le=2**40, description="steps of linear warm-up from 0")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final learning rate / lr")
    clip: float | None = Field(1.0, gt=0, le=1e9, description="maximum norm of the whole gradient; null: no clipping")
    seed: HumanInt = Field(0, ge=0, lt=2**63, description="seed of initial weights and dropout")
    deterministic: bool = Field(False, description="raise an error for nondeterministic operations")
    eval_every: HumanInt = Field(
        0,
        ge=0,
        le=2**40,
        description="steps between evaluations on held-out documents; 0: only at the end, if anything is held out",
    )
    eval_batches: HumanInt = Field(8, ge=1, le=2**30, description="rows per evaluation on every replica")
    log_every: HumanInt = Field(
        1, ge=1, le=2**30, description="steps between progress lines; metrics.jsonl has every step"
    )
    non_finite: Literal["stop"] = Field(
        "stop",
        description="what to do on nan or inf in loss or gradient: stop before the update (in fp16, an overflowing "
        "gradient skips the step and lowers the loss scale instead)",
    )
