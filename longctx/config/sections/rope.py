"""`model.rope:` rotary positions, by the names of transformers' `rope_parameters`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longctx.config.fields import HumanInt, Numbers, Section

RopeType = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]


class RopeSection(Section):
    """Rotary positions of every layer that attends to the whole row; the names are transformers'."""

    rope_type: RopeType = Field(
        description="default: unscaled; linear: position interpolation; dynamic: NTK by the length of the row; yarn, "
        "longrope, llama3: by frequency"
    )
    rope_theta: float | None = Field(
        None, gt=1, le=1e15, description="base of the frequencies; default: the folder's, else the architecture's"
    )
    factor: float | None = Field(
        None,
        ge=1,
        le=1e6,
        description="how much longer rows become; default for linear, yarn and llama3: the longest row / "
        "original_max_position_embeddings",
    )
    original_max_position_embeddings: HumanInt | None = Field(
        None, ge=2, le=2**32, description="positions before the extension; default: those of the folder"
    )
    attention_factor: float | None = Field(
        None, gt=0, le=1e3, description="factor of queries and keys (yarn, longrope); default: by `factor`"
    )
    beta_fast: float | None = Field(
        None, gt=0, le=1e6, description="yarn: rotations above which a frequency is kept; default: 32"
    )
    beta_slow: float | None = Field(
        None, gt=0, le=1e6, description="yarn: rotations below which a frequency is divided by `factor`; default: 1"
    )
    mscale: float | None = Field(None, gt=0, le=1e3, description="yarn: attention_factor as DeepSeek computes it")
    mscale_all_dim: float | None = Field(None, gt=0, le=1e3, description="yarn: as `mscale`")
    truncate: bool | None = Field(None, description="yarn: round the range of frequencies outwards; default: true")
    low_freq_factor: float | None = Field(None, gt=0, le=1e6, description="llama3: default 1")
    high_freq_factor: float | None = Field(None, gt=0, le=1e6, description="llama3: default 4")
    short_factor: Numbers | None = Field(
        None, description="longrope: divisor of each frequency in rows up to original_max_position_embeddings"
    )
    long_factor: Numbers | None = Field(None, description="longrope: divisor of each frequency in longer rows")
    partial_rotary_factor: float | None = Field(
        None, gt=0, le=1, description="share of each head that is rotated; default: the folder's"
    )
