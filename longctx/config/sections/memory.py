"""`memory:` tiling, recomputation and offload of logits and activations."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longctx.config.fields import Section, Tile


class MemorySection(Section):
    """Tiling, recomputation and offload of logits and activations, which grow with the sequence."""

    loss_tile: Tile = Field(
        "auto",
        description="tokens per tile of logits; auto: chosen by size, or untiled where the loss cannot be tiled; none: "
        "all tokens of a rank at once",
    )
    loss_backend: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="kernel for the loss and gradient of one tile of logits; auto: the fused Triton kernel on a GPU "
        "where triton is installed, else PyTorch operators",
    )
    z_loss: float = Field(
        0.0, ge=0, le=1, description="weight of lse² in the training loss, lse being the log of the softmax denominator"
    )
    mlp_tile: Tile = Field(
        "none",
        description="tokens per tile of an MLP, recomputed in backward; auto: hidden_size / 2, at least 128",
    )
    recompute: Literal["none", "mlp", "layer", "layer_keep_attention"] = Field(
        "none",
        description="what to recompute in backward: mlp: the intermediates of MLPs; layer: whole layers from their "
        "input, needed for long sequences; layer_keep_attention: layers except attention, so that no ring "
        "communication is repeated",
    )
    offload_checkpoints: bool = Field(
        False,
        description="keep each layer's checkpoint (recompute: layer or layer_keep_attention) in host memory until its "
        "backward; copies overlap with compute; no effect without a GPU",
    )
    recompute_norms: bool = Field(
        False,
        description="RMSNorms save only their input and recompute the rest in backward, their output too where "
        "attention or a tiled MLP follows; saves 10 to 12 x hidden_size bytes per token and layer (bf16) "
        "for about 1 % of the time",
    )
