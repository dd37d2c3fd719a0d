"""`attention:` how attention over the sharded sequence is computed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longctx.config.fields import HumanInt, Raw, Section


class AttentionSection(Section):
    """Exact softmax attention over the ring, and layers whose state has a bounded size."""

    layout: Literal["zigzag", "contiguous", "striped"] = Field(
        "zigzag",
        description="how tokens are assigned to ranks; zigzag and striped balance causal work over the ranks, "
        "contiguous does not",
    )
    backend: Literal["auto", "aten", "reference", "triton", "triton-tma", "cudnn", "flash"] = Field(
        "auto",
        description="kernel for one block of attention: aten (fused, CPU), reference (plain PyTorch), triton, "
        "triton-tma, cudnn, flash (fused, GPU); auto chooses by device",
    )
    window: HumanInt | None = Field(
        None,
        ge=1,
        le=2**40,
        description="keys that each token attends to, including its own (architectures with a sliding window only); "
        "default: the architecture's",
    )
    layers: Raw = Field(
        default_factory=dict,
        description='kind of attention per layer, e.g. {"0-2": ring, "3": {window: 1024}, "4-10": {abc: {slots: 64}}, '
        '"11": cosine}; "*" is every layer, later entries win, layers not named keep exact attention '
        "(docs/bounded_models.md lists the options)",
    )
