"""Save and restore one rank's random states (python, numpy, torch, CUDA) as JSON, for the same dropout after resume."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy
import torch

from longctx.errors import CheckpointError
from longctx.train.durable import write_atomically


def name_of(rank: int) -> str:
    """Return the file name of a rank's random state inside a checkpoint."""
    return f"rng-{rank:05d}.json"


def capture() -> dict[str, Any]:
    """Return this process's random states as plain data."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda": bytes(torch.cuda.get_rng_state().tolist()).hex() if torch.cuda.is_available() else None,
    }


def restore(state: dict[str, Any]) -> None:
    """Set this process's random states to those that ``capture`` returned.

    Raises:
        CheckpointError: the state is not in ``capture``'s format.
    """
    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        kind, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
        torch.set_rng_state(_tensor(state["torch"]))
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(_tensor(state["cuda"]))
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the saved random state cannot be restored: {error}") from None


def save(folder: Path, rank: int) -> Path:
    """Write this rank's states into ``folder`` and return the file's path."""
    path = folder / name_of(rank)
    write_atomically(path, json.dumps(capture()))
    return path


def load(folder: Path, rank: int) -> None:
    """Restore this rank's states from ``folder``."""
    path = folder / name_of(rank)
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    restore(state)


def _tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
