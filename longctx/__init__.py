"""longctx: train transformers on sequences as long as all your devices together can hold, with DeepSpeed.

This file is the table of contents. Names load on first use, so ``import longctx`` imports neither torch, triton nor
deepspeed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longctx import moved

moved.install()

__version__ = "0.1.0"

_PARTS = ("bounded", "hf", "nn")  # sub-packages that are used as such: longctx.nn.ABCAttention

_HOME = {  # public name -> module it lives in
    "Mesh": "longctx.mesh",
    "shard": "longctx.sharding",
    "unshard": "longctx.sharding",
    "positions": "longctx.sharding",
    "block_attention": "longctx.attention.block",
    "ring_attention": "longctx.attention.ring",
    "el_attention": "longctx.decode.el",
    "enable_el": "longctx.generation.el",
    "disable_el": "longctx.generation.el",
    "generate": "longctx.generation.generate",
    "abc_attention": "longctx.bounded.abc.operator",
    "cosine_attention": "longctx.bounded.cosine.operator",
    "convert": "longctx.models.convert",
    "register": "longctx.models.register",
    "initialize": "longctx.engine.initialize",
    "attach": "longctx.engine.attach",
    "build": "longctx.engine.build",
    "Engine": "longctx.engine.engine",
    "windows": "longctx.engine.windows",
    "shard_window": "longctx.engine.step.window",
    "shard_rows": "longctx.engine.step.window",
    "token_logprobs": "longctx.engine.step.logprobs",
    "LongctxError": "longctx.errors",
}

__all__ = [
    "Engine",
    "LongctxError",
    "Mesh",
    "abc_attention",
    "attach",
    "block_attention",
    "build",
    "disable_el",
    "el_attention",
    "enable_el",
    "generate",
    "convert",
    "cosine_attention",
    "initialize",
    "positions",
    "register",
    "ring_attention",
    "shard",
    "shard_rows",
    "shard_window",
    "token_logprobs",
    "unshard",
    "windows",
]

if TYPE_CHECKING:
    from longctx.attention.block import block_attention as block_attention
    from longctx.attention.ring import ring_attention as ring_attention
    from longctx.bounded.abc.operator import abc_attention as abc_attention
    from longctx.bounded.cosine.operator import cosine_attention as cosine_attention
    from longctx.decode.el import el_attention as el_attention
    from longctx.engine.attach import attach as attach
    from longctx.engine.build import build as build
    from longctx.engine.engine import Engine as Engine
    from longctx.engine.initialize import initialize as initialize
    from longctx.engine.step.logprobs import token_logprobs as token_logprobs
    from longctx.engine.step.window import shard_rows as shard_rows
    from longctx.engine.step.window import shard_window as shard_window
    from longctx.engine.windows import windows as windows
    from longctx.errors import LongctxError as LongctxError
    from longctx.generation.el import disable_el as disable_el
    from longctx.generation.el import enable_el as enable_el
    from longctx.generation.generate import generate as generate
    from longctx.mesh import Mesh as Mesh
    from longctx.models.convert import convert as convert
    from longctx.models.register import register as register
    from longctx.sharding import positions as positions
    from longctx.sharding import shard as shard
    from longctx.sharding import unshard as unshard


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _PARTS:
        return import_module(f"longctx.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'longctx' has no attribute {name!r}; it has {', '.join(__all__)}")
    module = import_module(_HOME[name])
    # A public name may equal its module's (longctx.engine.attach.attach): bind the object, not the module.
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
