"""register(): make ``attn_implementation="longctx"`` known to transformers, attention and mask under one name."""

from __future__ import annotations

NAME = "longctx"


def register() -> None:
    """Register longctx's attention function and its mask function with transformers (idempotent).

    The mask function matters as much as the attention function: with none under the same name, transformers passes no
    padding and no packing at all, without a word. A model with no mesh runs as a ring of one on its own device.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    from longctx.models.hook import longctx_attention
    from longctx.models.masks import document_mask

    AttentionInterface.register(NAME, longctx_attention)
    AttentionMaskInterface.register(NAME, document_mask)
