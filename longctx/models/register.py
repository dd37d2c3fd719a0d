"""register(): register longctx's attention and mask functions and its converted models with transformers."""

from __future__ import annotations

from longctx.errors import MissingPackageError
from longctx.models.names import NAME

OLDEST = (
    5,
    17,
)  # of transformers: older mask functions have another signature, and older configs declare no fields


def register() -> None:
    """Register longctx's attention, its mask function and its converted models with transformers (idempotent).

    Without a mask function of the same name transformers would silently pass neither padding nor packing. A model
    without a mesh runs as a ring of one on its own device.

    Raises:
        MissingPackageError: transformers is too old.
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
    from longctx.models.hook.masks import document_ids_as_mask

    AttentionInterface.register(NAME, longctx_attention)
    AttentionMaskInterface.register(NAME, document_ids_as_mask)
    register_families()
