"""longctx.hf: Hugging Face's Trainer and TRL's trainers on sequences that are sharded over ranks.

Names load on first use: TRL is imported for ``SFTTrainer`` only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_HOME = {"Trainer": "trainer", "SFTTrainer": "sft", "ring": "ring"}
__all__ = ["SFTTrainer", "Trainer", "ring"]

if TYPE_CHECKING:
    from longctx.hf.ring import ring as ring
    from longctx.hf.sft import SFTTrainer as SFTTrainer
    from longctx.hf.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module 'longctx.hf' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"longctx.hf.{_HOME[name]}"), name)
    globals()[name] = value
    return value
