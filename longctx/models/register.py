"""register(): make ``attn_implementation="longctx"`` known to transformers, attention and mask under one name."""

from __future__ import annotations

from longctx.errors import MissingPackageError
from longctx.models.names import NAME

OLDEST = (5, 17)  # transformers; before it, mask functions have another signature and configs declare no fields


def register() -> None:
    """Register longctx's attention, its mask function and its converted models with transformers (idempotent).

    The mask function matters as much as the attention function: with none under the same name, transformers passes no
    padding and no packing at all, without a word. A model with no mesh runs as a ring of one on its own device.

    Raises:
        MissingPackageError: transformers is older than longctx can work with.
    """
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface

    major, minor = transformers.__version__.split(".")[:2]
    if (int(major), int(minor)) < OLDEST:
        raise MissingPackageError(
            f"transformers {transformers.__version__} is too old: pip install 'transformers>={OLDEST[0]}.{OLDEST[1]}'"
        )

    from longctx.models.hook.attention import longctx_attention
    from longctx.models.hook.families import register_families
    from longctx.models.hook.masks import document_mask

    AttentionInterface.register(NAME, longctx_attention)
    AttentionMaskInterface.register(NAME, document_mask)
    register_families()
