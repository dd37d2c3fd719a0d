"""Check a run directory before a run starts in it. Without torch: launchers call this before any rank starts.

``saved.json`` records the last step that was saved. It distinguishes a run that was killed before its first checkpoint,
which may start over, from one whose checkpoints were lost, which must not start over silently.
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
    """Record that the checkpoint of ``step`` is published; 0 at the start of a run without checkpoints."""
    durable.write_json(output / SAVED, {"step": step})


def saved_step(output: Path) -> int | None:
    """Return the last step that this run saved, 0 if it saved none; None if there is no valid record."""
    try:
        step = json.loads((output / SAVED).read_bytes())["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) and step >= 0 else None


def require_usable(output: Path) -> None:
    """Reject a run directory in which a run would fail later or start over silently. Nothing is changed.

    Raises:
        CheckpointError: a path that a run writes is blocked, a step folder has no manifest, or steps were trained whose
            checkpoints are missing.
    """
    root = output / CHECKPOINTS
    _require_kinds(output)
    bare = [path for path in store.steps(root) if not (path / manifest.NAME).is_file()]
    if bare:
        listed = ", ".join(path.name for path in bare[:8])
        raise CheckpointError(
            f"{root}: {listed} without {manifest.NAME}, so it is unknown what a resumed run would lose; restore the "
            f"file from a copy, delete the folder to continue without it, or {START_OVER}"
        )
    if not store.published(root):
        _require_new(output, root)


def lost(output: Path) -> str | None:
    """Return a notice if the newest checkpoint is older than the last step that was saved, else None."""
    names, saved = store.published(output / CHECKPOINTS), saved_step(output)
    if not names or saved is None or store.step_of(names[0]) >= saved:
        return None
    return f"checkpoint {store.name_of(saved)} was saved and is missing; the newest remaining one is {names[0].name}"


def _require_kinds(output: Path) -> None:
    """Reject existing paths of the wrong kind where the run writes later, some only after the last step."""
    for name in FOLDERS:
        path = output / name
        if path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"{path} is a link to {path.readlink()}, which does not exist; create that folder, or remove the link"
            )
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path} is a file where a run needs a folder; move it away")
    for name in FILES:
        if (output / name).is_dir():
            raise CheckpointError(f"{output / name} is a folder where a run writes a file; move it away")


def _require_new(output: Path, root: Path) -> None:
    """Refuse to start over where steps were trained, unless the record shows that none of them was saved."""
    done = max((record["step"] for record in metrics.read(output)), default=0)
    saved = saved_step(output)
    if saved == 0 or (saved is None and done == 0):
        return
    what = f"saved step {saved}" if saved else f"trained {done} steps ({output / metrics.NAME})"
    raise CheckpointError(
        f"this run {what}, but {root} holds no checkpoint; restore it from a copy, or {START_OVER} (deleting "
        f"{metrics.NAME} and {SAVED} in this one does the same)"
    )
