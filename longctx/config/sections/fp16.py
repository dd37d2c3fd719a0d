"""`fp16:` the loss scale of runs in fp16."""

from __future__ import annotations

from pydantic import Field

from longctx.config.fields import HumanInt, Section


class Fp16Section(Section):
    """Loss scaling under model.dtype fp16: the loss is multiplied so that small gradients do not underflow."""

    scale_power: HumanInt = Field(16, ge=0, le=32, description="the initial loss scale is 2 to this power")
    window: HumanInt = Field(
        1000, ge=1, le=2**30, description="steps without an overflow after which the loss scale is doubled"
    )
    hysteresis: HumanInt = Field(
        2,
        ge=1,
        le=2**20,
        description="the loss scale is halved from this overflow on (from the first with zero.stage 0); every "
        "overflow skips its step on all ranks",
    )
    min_scale: HumanInt = Field(
        1, ge=1, le=2**32, description="smallest loss scale; an overflow at this scale stops the run before the update"
    )
    static_scale: float | None = Field(
        None, gt=0, le=2**32, description="fixed loss scale for the whole run, which no overflow changes; null: dynamic"
    )
