"""`model:` a transformers architecture from scratch, or a pretrained folder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longctx.config.fields import HumanInt, Raw, Section, environment_field
from longctx.config.sections.lora import LoraSection
from longctx.config.sections.rope import RopeSection

Architecture = Literal[
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "phi", "olmo", "olmo2"
]


class ModelSection(Section):
    """The model: `architecture` and sizes to start from random weights, or `pretrained` to start from a folder."""

    architecture: Architecture | None = Field(
        None, description="transformers model type to build from scratch; omit it when `pretrained` is given"
    )
    pretrained: str | None = environment_field(
        None,
        min_length=1,
        description="local folder with config.json and safetensors; nothing is downloaded and no code in it is run",
    )
    hidden_size: HumanInt | None = Field(None, ge=8, le=2**20, description="width of the residual stream")
    layers: HumanInt | None = Field(None, ge=1, le=4096, description="number of transformer blocks")
    heads: HumanInt | None = Field(None, ge=1, le=4096, description="query heads of each layer")
    kv_heads: HumanInt | None = Field(
        None, ge=1, le=4096, description="key/value heads (grouped-query attention); default: as many as `heads`"
    )
    head_dim: HumanInt | None = Field(None, ge=2, le=1024, description="size of one head; default: hidden_size / heads")
    intermediate_size: HumanInt | None = Field(
        None,
        ge=8,
        le=2**22,
        description="width of the MLP; default: 8/3 of hidden_size (4 for gpt2 and phi), rounded up to a multiple "
        "of 64",
    )
    vocab_size: HumanInt | None = Field(
        None, ge=2, le=2**24, description="rows of the embedding; default: the tokenizer's size"
    )
    max_positions: HumanInt | None = Field(
        None,
        ge=2,
        le=2**32,
        description="longest sequence the model is declared for (learned positions, RoPE scaling); default: "
        "data.sequence_length; with `pretrained`: the folder's own, which this key or `rope` can raise unless "
        "positions are learned",
    )
    rope: RopeSection | None = Field(
        None, description="rotary positions, to extend a pretrained model to longer rows or for a model from scratch"
    )
    lora: LoraSection | None = Field(
        None, description="train adapters of low rank and freeze the weights of `pretrained` (needs longctx[peft])"
    )
    tie_embeddings: bool = Field(False, description="share the embedding with the output layer")
    extra: Raw = Field(
        default_factory=dict,
        description="further keywords for the transformers config; keywords that a key of ours owns are refused; with "
        "`pretrained` only rope_parameters, without the checks of `rope`",
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="precision of forward and backward; bf16 and fp16 keep fp32 master weights in the optimizer, fp16 "
        "scales the loss (section fp16)",
    )
