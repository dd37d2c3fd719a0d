"""`output:` the run directory and what is written to it."""

from __future__ import annotations

from pydantic import Field

from longctx.config.fields import HumanInt, Section, environment_field


class OutputSection(Section):
    """The run directory: resolved config, metrics.jsonl, checkpoints, loss.png, summary.json, logs."""

    folder: str = environment_field(min_length=1, description="the run directory; created if missing")
    tensorboard: bool = Field(False, description="write TensorBoard events too (needs longctx[tensorboard])")
    plot: bool = Field(True, description="draw loss.png at the end (needs longctx[plot])")
    sample_prompt: HumanInt = Field(
        64, ge=1, le=2**20, description="tokens of a held-out document that prompt the final sample"
    )
    sample_tokens: HumanInt = Field(
        64, ge=0, le=2**20, description="tokens to generate in the final sample; 0: no sample"
    )
