"""`memory:` how much of logits and activations a training step holds at once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longctx.config.fields import Section, Tile


class MemorySection(Section):
    """Tiling, recomputation and offload of logits and activations, which grow with the sequence."""

    loss_tile: Tile = Field(
        "auto",
        description="tokens whose logits exist at once; auto chooses (and does not tile a loss that it cannot), none "
        "computes the logits of all of a rank's tokens at once",
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
        description="tokens that an MLP computes at once, recomputed in backward; auto: hidden_size / 2, at least 128",
    )
    recompute: Literal["none", "mlp", "layer", "layer_keep_attention"] = Field(
        "none",
        description="what to recompute in backward: mlp: the intermediates of MLPs; layer: whole layers from their "
        "input, needed for long sequences; layer_keep_attention: layers without attention, so that no hop "
        "of the ring is repeated",
    )
    offload_checkpoints: bool = Field(
        False,
        description="keep what recompute: layer and layer_keep_attention save of each layer in host memory until its "
        "backward; copies overlap with compute. Without a GPU it has no effect",
    )
    recompute_norms: bool = Field(
        False,
        description="RMSNorms save only their input and recompute the rest in backward, their output too where "
        "attention or a tiled MLP follows; saves 10 to 12 x hidden_size bytes per token and layer (bf16) "
        "for about 1 % of the time",
    )
