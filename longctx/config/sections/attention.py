"""`attention:` how attention over the sharded sequence is computed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longctx.config.fields import HumanInt, Section


class Attention(Section):
    """Exact softmax attention over the ring."""

    layout: Literal["zigzag", "contiguous", "striped"] = "zigzag"
    """which tokens a rank holds; zigzag and striped share causal work equally, contiguous does not"""
    backend: Literal["auto", "aten", "reference", "triton"] = "auto"
    """what computes a block: aten (fused, CPU), reference (plain PyTorch), triton (not built); auto: the best"""
    window: HumanInt | None = Field(None, ge=1, le=2**40)
    """keys a token sees to its left, itself included, in architectures with sliding windows; default: the model's"""
