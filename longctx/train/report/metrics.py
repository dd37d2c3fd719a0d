"""Read and write metrics.jsonl, one JSON object per step, written unbuffered; optionally TensorBoard events too."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longctx.errors import CheckpointError, MissingPackageError
from longctx.train.durable import write_atomically

NAME = "metrics.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the records of ``folder/metrics.jsonl``; truncated or damaged lines are skipped."""
    return _records(folder / NAME)[0]


def _records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return a file's records and its number of damaged lines, not counting a last line that a crash truncated."""
    if not path.is_file():
        return [], 0
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    found = [_record(line) for line in lines]
    damaged = sum(record is None and bool(line.strip()) for record, line in zip(found[:-1], lines[:-1], strict=True))
    return [record for record in found if record is not None], damaged


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # not UTF-8 is a ValueError too
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def held_out(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, loss) of every evaluation in a run's records; step 0 is the one before training."""
    found = [(0, record.get("eval_loss_at_start")) for record in records[:1]]
    found += [(record["step"], record.get("eval_loss")) for record in records]
    return [(step, loss) for step, loss in found if loss is not None]


class Metrics:
    """Writes a run's metrics, on rank 0 only.

    Args:
        folder: the run directory.
        resume_step: records after this step are dropped, because those steps are trained again.
        tensorboard: write event files to ``folder/tensorboard`` too.
        say: prints notices for the user.

    Raises:
        MissingPackageError: ``tensorboard`` is set and the package is not installed.
        CheckpointError: existing metrics cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        resume_step: int = 0,
        tensorboard: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        found, damaged = _records(folder / NAME)
        if damaged:
            copy = folder / f"{NAME}.damaged"
            shutil.copyfile(folder / NAME, copy)
            say(f"{folder / NAME}: {damaged} damaged lines are left out; the file as it was is {copy}")
        kept = [record for record in found if record["step"] <= resume_step]
        if dropped := len(found) - len(kept):
            say(f"{folder / NAME}: {dropped} steps after step {resume_step} are dropped, they are trained again")
        write_atomically(folder / NAME, "".join(json.dumps(record) + "\n" for record in kept))
        self._path, self._say = folder / NAME, say
        self._file = self._path.open("ab", buffering=0)
        self._unwritten, self._full = b"", False
        self._board = _tensorboard(folder / "tensorboard", resume_step) if tensorboard else None

    def write(self, record: dict[str, Any]) -> None:
        """Write one step's record; ``record["step"]`` is required. Non-finite values are written as null.

        A full disk does not end the run: records are buffered in memory until there is space again.
        """
        clean = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in record.items()}
        self._unwritten += json.dumps(clean).encode() + b"\n"
        self._flush()
        if self._board is not None:
            for key, value in clean.items():
                if isinstance(value, int | float) and key != "step":
                    self._board.add_scalar(f"train/{key}", value, clean["step"])

    def _flush(self) -> None:
        """Write as much of the buffer as possible; print a notice at the first failure."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._full = False
        except OSError as error:
            if not self._full:
                self._say(f"{self._path} cannot be written: {error.strerror}. Training goes on; make room on the disk")
            self._full = True

    def close(self) -> None:
        """Flush and close the files."""
        self._flush()
        if self._unwritten:
            lost = self._unwritten.count(b"\n")
            self._say(f"{self._path}: the numbers of {lost} steps could not be written and are lost")
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
