"""`model.lora:` adapters of low rank on a frozen pretrained model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longctx.config.fields import HumanInt, Section, Texts


class LoraSection(Section):
    """LoRA through PEFT: freeze the weights of `pretrained`, and train pairs of small matrices beside them."""

    rank: HumanInt = Field(ge=1, le=2**16, description="inner size r of each adapter")
    alpha: float | None = Field(
        None, gt=0, le=1e6, description="an adapter adds alpha / rank times its product; default: 2 x rank"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of each adapter's input")
    targets: Texts = Field(
        ("all-linear",),
        min_length=1,
        description="ends of the names of linear layers that get an adapter, e.g. [q_proj, v_proj]; all-linear: every "
        "one but the output layer",
    )
    modules_to_save: Texts = Field(
        (), description="ends of the names of modules trained and saved whole, e.g. [embed_tokens, lm_head]"
    )
    rslora: bool = Field(False, description="scale by alpha / √rank instead, for large ranks")
    export: Literal["merged", "adapter"] = Field(
        "merged",
        description="what the run writes to `model`; merged: the whole model, for plain transformers; adapter: what "
        "PeftModel.from_pretrained loads onto `pretrained`",
    )
