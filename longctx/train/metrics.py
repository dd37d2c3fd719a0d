"""metrics.jsonl: one JSON object a step, flushed as it is written; the same numbers to TensorBoard if asked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from longctx.errors import MissingPackageError
from longctx.train.durable import write_atomically

NAME = "metrics.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the records of ``folder/metrics.jsonl``; a last line that a crash cut short is left out."""
    path = folder / NAME
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def held_out(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, loss) of every evaluation in a run's records; the one before training is step 0."""
    found = [(0, record.get("eval_loss_at_start")) for record in records[:1]]
    found += [(record["step"], record.get("eval_loss")) for record in records]
    return [(step, loss) for step, loss in found if loss is not None]


class Metrics:
    """Writes a run's numbers. Made on rank 0 only.

    Args:
        folder: the run directory.
        resume_step: records after this step are dropped: they are about to be made again.
        tensorboard: write event files to ``folder/tensorboard`` too.

    Raises:
        MissingPackageError: TensorBoard was asked for and is not installed.
    """

    def __init__(self, folder: Path, resume_step: int = 0, tensorboard: bool = False) -> None:
        kept = [record for record in read(folder) if record.get("step", 0) <= resume_step]
        write_atomically(folder / NAME, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = (folder / NAME).open("a", buffering=1)
        self._board = _tensorboard(folder / "tensorboard", resume_step) if tensorboard else None

    def write(self, record: dict[str, Any]) -> None:
        """Write one step's numbers; ``record["step"]`` is required. What is not finite is written as null."""
        clean = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in record.items()}
        self._file.write(json.dumps(clean) + "\n")
        if self._board is not None:
            for key, value in clean.items():
                if isinstance(value, int | float) and key != "step":
                    self._board.add_scalar(f"train/{key}", value, clean["step"])

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingPackageError(
            "output.tensorboard is true and tensorboard is not installed: pip install 'longctx[tensorboard]', or "
            "set it to false"
        ) from None
    return SummaryWriter(str(folder), purge_step=resume_step + 1)
