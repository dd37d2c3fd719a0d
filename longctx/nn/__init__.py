"""Layers and tiled parts: ``longctx.nn.ABCAttention``, ``longctx.nn.tiled_loss`` and others, loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longctx.nn.attention import ABCAttention as ABCAttention
    from longctx.nn.attention import CosineAttention as CosineAttention
    from longctx.nn.loss import tiled_loss as tiled_loss
    from longctx.nn.tokenwise import tiled as tiled

_HOMES = {"ABCAttention": "attention", "CosineAttention": "attention", "tiled": "tokenwise", "tiled_loss": "loss"}
__all__ = ["ABCAttention", "CosineAttention", "tiled", "tiled_loss"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longctx.nn' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(f"longctx.nn.{_HOMES[name]}"), name)
