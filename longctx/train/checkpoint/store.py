"""The folder of checkpoints: names, publication by rename, retention, clean-up after a crash.

    checkpoints/
      step-00000020/     published: manifest.json, DeepSpeed's files, rng-00000.json …
      latest             name of the newest one; DeepSpeed's own tools read it too
      .tmp-…  .old-…     unfinished or discarded; deleted at the next start

Plain file operations for one process (rank 0); ``checkpointer`` coordinates the ranks.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from longctx.errors import CheckpointError
from longctx.train import durable
from longctx.train.checkpoint import manifest

POINTER = "latest"
_STEP = re.compile(r"step-(\d{8,})")


def name_of(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def published(root: Path) -> list[Path]:
    """Return the checkpoints in ``root`` that have a manifest, newest first. Their contents are not checked."""
    return [path for path in steps(root) if (path / manifest.NAME).is_file()]


def steps(root: Path) -> list[Path]:
    """Return every path in ``root`` with a checkpoint's name, newest first, with or without a manifest."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _STEP.fullmatch(path.name)), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint's folder name."""
    return int(folder.name.removeprefix("step-"))


def read(folder: Path) -> manifest.Manifest:
    """Return a checkpoint's manifest without checking its files.

    Raises:
        CheckpointError: the manifest is invalid, or its step differs from the folder's name.
    """
    found = manifest.read_manifest(folder)
    if folder.name != name_of(found.step):  # loading derives the folder's name from the manifest's step
        raise CheckpointError(
            f"{folder}: its manifest is that of step {found.step}; do not rename a checkpoint's folder"
        )
    return found


def begin(root: Path, step: int) -> Path:
    """Create and return a new folder ``root/.tmp-…/``, in which ``step-…/`` is written."""
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f".tmp-{name_of(step)}-{secrets.token_hex(4)}"
    (folder / name_of(step)).mkdir(parents=True)
    return folder


def publish(temporary: Path, step: int) -> Path:
    """Publish a complete checkpoint by one rename, then update the pointer. Its manifest must be written already."""
    root, target = temporary.parent, temporary.parent / name_of(step)
    # The order makes a crash at any point harmless: contents reach the disk before the rename, the rename reaches the
    # disk before the pointer names it, and only then are replaced and unfinished folders deleted.
    durable.fsync_folder(temporary / target.name)
    if target.exists():  # a damaged or repeated save of the same step: renamed now, deleted once it is replaced
        target.rename(root / f".old-{target.name}-{secrets.token_hex(4)}")
    (temporary / target.name).rename(target)
    durable.fsync_folder(root)
    durable.write_atomically(root / POINTER, target.name)
    clean(root)
    return target


def clean(root: Path) -> None:
    """Delete the remains of unfinished saves and deletions. Only the holder of the run's lock may call it."""
    if not root.is_dir():
        return
    for path in root.iterdir():
        if re.match(r"\.(tmp|old)-", path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(f".{POINTER}.") and path.is_file():
            path.unlink(missing_ok=True)


def retain(root: Path, keep: int) -> list[str]:
    """Delete all but the newest ``keep`` valid checkpoints; return the deleted names.

    A checkpoint with a wrong manifest or file size does not count towards ``keep``. At least one valid one is kept.
    """
    whole, deleted = 0, []
    for path in published(root):
        if whole >= max(keep, 1):
            os.rename(path, root / f".old-{path.name}-{secrets.token_hex(4)}")  # atomic: never a half-deleted `step-…`
            deleted.append(path.name)
        elif _looks_whole(path):
            whole += 1
    clean(root)
    return deleted


def require_space(root: Path, needed: int) -> None:
    """Raise CheckpointError if ``root``'s disk has less than ``needed`` bytes free."""
    free = shutil.disk_usage(root).free
    if free < needed:
        raise CheckpointError(
            f"{root}: a checkpoint needs about {needed / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f} MiB "
            "free; free some space, lower checkpoint.keep, or choose another output.folder. Older ones are intact"
        )


def _looks_whole(folder: Path) -> bool:
    try:
        manifest.verify_files(folder, read(folder), hash_ranks=())
    except CheckpointError:
        return False
    return True
