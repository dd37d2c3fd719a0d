"""Layers: ``longctx.nn.ABCAttention``, ``longctx.nn.CosineAttention``, loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longctx.nn.attention import ABCAttention as ABCAttention
    from longctx.nn.attention import CosineAttention as CosineAttention

__all__ = ["ABCAttention", "CosineAttention"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'longctx.nn' has no attribute {name!r}; it has {', '.join(__all__)}")
    from longctx.nn import attention

    return getattr(attention, name)
