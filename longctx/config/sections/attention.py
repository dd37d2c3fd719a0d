"""`attention:` how attention over the sharded sequence is computed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longctx.config.fields import HumanInt, Raw, Section


class AttentionSection(Section):
    """Exact softmax attention over the ring, and layers whose memory does not grow."""

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
    layers: Raw = Field(
        default_factory=dict,
        description='how chosen layers attend instead, e.g. {"0-2": ring, "3": {window: 1024}, "4-10": {abc: {slots: '
        '64}}, "11": cosine}; "*" is all of them, later entries win, layers not named stay exact '
        "(docs/bounded_models.md has the options)",
    )
