"""What a run directory must look like before a run starts in it. Without torch: launchers ask before any rank starts.

``saved.json`` beside the checkpoints remembers the last step that was saved. Without it nobody could tell a run that
was killed before its first checkpoint, which starts over, from one whose checkpoints were lost, which must not.
"""

from __future__ import annotations

import json
from pathlib import Path

from longctx.errors import CheckpointError
from longctx.train import durable
from longctx.train.checkpoint import manifest, store
from longctx.train.report import metrics

CHECKPOINTS = "checkpoints"
SAVED = "saved.json"
FOLDERS = (CHECKPOINTS, "model", "tokens", "logs", "tensorboard")
FILES = (
    metrics.NAME,
    SAVED,
    "config.yaml",
    "environment.json",
    "summary.json",
    "loss.png",
    f"{CHECKPOINTS}/{store.POINTER}",
)
START_OVER = "choose another output.folder to start over"


def note_saved(output: Path, step: int) -> None:
    """Write down that the checkpoint of ``step`` is published; 0 at the start of a run that has none yet."""
    durable.write_json(output / SAVED, {"step": step})


def saved_step(output: Path) -> int | None:
    """Return the last step that this run saved, 0 if it has saved none; None if nobody wrote it down."""
    try:
        step = json.loads((output / SAVED).read_bytes())["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) and step >= 0 else None


def require_usable(output: Path) -> None:
    """Refuse a run directory in which a run could not go on, or would start over unasked. Nothing is changed.

    Raises:
        CheckpointError: something is in the way of what a run writes, a step folder has no manifest, or there are
            numbers of steps whose checkpoints are gone.
    """
    root = output / CHECKPOINTS
    _require_kinds(output)
    bare = [path for path in store.steps(root) if not (path / manifest.NAME).is_file()]
    if bare:
        listed = ", ".join(path.name for path in bare[:8])
        raise CheckpointError(
            f"{root}: {listed} without {manifest.NAME}, so nobody can tell what a resumed run would lose; restore the "
            f"file from a copy, delete the folder to go on without it, or {START_OVER}"
        )
    if not store.published(root):
        _require_new(output, root)


def lost(output: Path) -> str | None:
    """Return a notice if the newest checkpoint is older than the last one that was saved, else None."""
    names, saved = store.published(output / CHECKPOINTS), saved_step(output)
    if not names or saved is None or store.step_of(names[0]) >= saved:
        return None
    return f"checkpoint {store.name_of(saved)} was saved and is gone; the newest that is left is {names[0].name}"


def _require_kinds(output: Path) -> None:
    """Refuse what is in the way of something that is written later, much of it only after the last step."""
    for name in FOLDERS:
        path = output / name
        if path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"{path} is a link to {path.readlink()}, which does not exist; make that folder, or remove the link"
            )
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path} is a file where a run needs a folder; move it away")
    for name in FILES:
        if (output / name).is_dir():
            raise CheckpointError(f"{output / name} is a folder where a run writes a file; move it away")


def _require_new(output: Path, root: Path) -> None:
    """Refuse to start over where steps were trained, unless it is known that none of them was saved."""
    done = max((record["step"] for record in metrics.read(output)), default=0)
    saved = saved_step(output)
    if saved == 0 or (saved is None and done == 0):
        return
    what = f"saved step {saved}" if saved else f"trained {done} steps ({output / metrics.NAME})"
    raise CheckpointError(
        f"this run {what}, but {root} holds no checkpoint; restore it from a copy, or {START_OVER} (deleting "
        f"{metrics.NAME} and {SAVED} in this one does the same)"
    )
