"""longctx.hf: Hugging Face's Trainer and TRL's trainers on sequences that are sharded over ranks.

Names load on first use: accelerate is imported for any of them, TRL for ``SFTTrainer`` only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["SFTTrainer", "Trainer", "ring"]

if TYPE_CHECKING:
    from longctx.hf.subclass import ring as ring
    from longctx.hf.trainer import Trainer as Trainer

    SFTTrainer: Any


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'longctx.hf' has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        globals()[name] = _load(name)
    except ImportError as missing:
        extra = "trl" if name == "SFTTrainer" else "hf"
        raise ImportError(f"longctx.hf.{name}: {missing}; pip install 'longctx[{extra}]'") from missing
    return globals()[name]


def _load(name: str) -> Any:
    from longctx.hf.subclass import ring
    from longctx.hf.trainer import Trainer

    if name == "SFTTrainer":
        from trl import SFTTrainer

        return ring(SFTTrainer)
    return {"ring": ring, "Trainer": Trainer}[name]
