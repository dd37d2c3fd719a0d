"""`memory:` what a training step keeps in memory beside weights and attention."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longctx.config.fields import Section, Tile


class MemorySection(Section):
    """Logits, activations and checkpoints, which grow with the sequence: how little of them exists at once."""

    loss_tile: Tile = Field(
        "auto",
        description="tokens whose logits exist at once; auto chooses (and leaves alone a model whose loss it cannot "
        "tile), none makes the logits of all of a rank's tokens",
    )
    loss_backend: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="what a tile's logits are turned into loss and gradient by: auto takes the fused kernel on a GPU "
        "where triton is installed, and torch's operators elsewhere",
    )
    z_loss: float = Field(
        0.0, ge=0, le=1, description="weight of lse² in the training loss, lse the log of the softmax's denominator"
    )
    mlp_tile: Tile = Field(
        "none",
        description="tokens that an MLP computes at once, its results recomputed in backward; auto takes half as "
        "many as hidden_size",
    )
    recompute: Literal["none", "mlp", "layer", "layer_keep_attention"] = Field(
        "none",
        description="what backward computes anew instead of keeping it: the inside of MLPs; all of a layer but its "
        "input, needed for long sequences; or that without attention, so that no hop of the ring is repeated",
    )
    offload_checkpoints: bool = Field(
        False,
        description="keep what recompute: layer and layer_keep_attention leave of a layer in host memory until its "
        "backward; the copies run beside the computation. Without a GPU there is nothing to move",
    )
    recompute_norms: bool = Field(
        False,
        description="RMSNorms keep only their input and compute the rest anew in backward, their result too where "
        "attention or a tiled MLP comes next: of a layer 10 to 12 bytes a token and hidden_size in bf16, for about a "
        "per cent of its time",
    )
