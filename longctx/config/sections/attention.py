"""`attention:` how attention over the sharded sequence is computed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longctx.config.fields import HumanInt, Section


class Attention(Section):
    """Exact softmax attention over the ring."""

    layout: Literal["zigzag", "contiguous", "striped"] = Field(
        "zigzag",
        description="tokens a rank holds; zigzag and striped share causal work equally, contiguous does not",
    )
    backend: Literal["auto", "aten", "reference", "triton", "triton-tma", "cudnn", "flash"] = Field(
        "auto",
        description="what computes a block: aten (fused, CPU), reference (plain PyTorch), triton (fused, GPU); auto",
    )
    window: HumanInt | None = Field(
        None,
        ge=1,
        le=2**40,
        description="keys a token sees to its left, itself too, where the architecture has windows; default: its own",
    )
