"""Load DeepSpeed's checkpoint files without executing code from them.

DeepSpeed reads with full pickle, which can execute arbitrary code. Here every read uses torch's weights-only unpickler,
with the few classes that DeepSpeed's own files need. There is no fallback: a file that needs any other class is
rejected, and the error names the class.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from longctx.errors import CheckpointError

# The classes in ZeRO 0-3 files besides tensors and plain containers. They are looked up in modules that are already
# loaded: a file cannot cause an import.
ALLOWED = (
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)


def allowed_classes() -> list[Any]:
    """Return the classes of ``ALLOWED`` whose modules are loaded."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in ALLOWED)
    return [value for value in found if isinstance(value, type)]


def safe_load(path: str | Path, map_location: Any = None) -> Any:
    """Read a file that ``torch.save`` wrote: tensors, plain containers, and the classes of ``ALLOWED``.

    Raises:
        CheckpointError: the file is damaged, or would need any other class or function to be called.
    """
    try:
        with torch.serialization.safe_globals(allowed_classes()):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises many types for damaged files; none may be retried with another reader
        reason = str(error).split("This error")[0].strip() or type(error).__name__
        unsafe = "Weights only load failed" in reason
        what = "refused: reading it would run code, or needs a class longctx does not allow" if unsafe else "damaged"
        raise CheckpointError(f"{path}: {what} ({reason.splitlines()[-1].strip()})") from None


def make_safe(engine: Any, read_already: dict[str, Any]) -> None:
    """Replace the reader of a DeepSpeed engine's checkpoint engine by ``safe_load``.

    Args:
        read_already: contents by path; each is returned once and freed. If files are read before DeepSpeed needs them,
            all ranks can raise together; a rank that failed inside DeepSpeed would leave the others waiting.
    """

    def load(path: str, map_location: Any = None) -> Any:
        return read_already.pop(str(path)) if str(path) in read_already else safe_load(path, map_location)

    engine.checkpoint_engine.load = load
