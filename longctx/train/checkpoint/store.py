"""The folder of checkpoints: names, publication by rename, retention, and what a crash left behind.

    checkpoints/
      step-00000020/     published: manifest.json, DeepSpeed's files, rng-00000.json …
      latest             name of the newest one, also what DeepSpeed's own tools look for
      .tmp-…  .old-…     unfinished or unwanted; deleted at the next start

Plain file operations for one process (rank 0); ``checkpoint`` adds the other ranks.
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
    """Return the checkpoints in ``root`` that have a manifest file, newest first. Their contents are not checked."""
    return [path for path in steps(root) if (path / manifest.NAME).is_file()]


def steps(root: Path) -> list[Path]:
    """Return everything in ``root`` that has the name of a checkpoint, newest first, with a manifest or without."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _STEP.fullmatch(path.name)), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint's name says."""
    return int(folder.name.removeprefix("step-"))


def read(folder: Path) -> manifest.Manifest:
    """Return a checkpoint's manifest, its files not yet looked at.

    Raises:
        CheckpointError: the manifest is no good, or that of another step than the folder's name says.
    """
    found = manifest.read_manifest(folder)
    if folder.name != name_of(found.step):  # what is loaded is named by the manifest's step
        raise CheckpointError(
            f"{folder}: its manifest is that of step {found.step}; a checkpoint's folder keeps its name"
        )
    return found


def begin(root: Path, step: int) -> Path:
    """Make and return a fresh folder ``root/.tmp-…/`` in which ``step-…/`` will be written."""
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f".tmp-{name_of(step)}-{secrets.token_hex(4)}"
    (folder / name_of(step)).mkdir(parents=True)
    return folder


def publish(temporary: Path, step: int) -> Path:
    """Make a complete checkpoint visible by one rename, then move the pointer. Its manifest must be written."""
    root, target = temporary.parent, temporary.parent / name_of(step)
    durable.fsync_folder(temporary / target.name)
    if target.exists():  # a damaged or repeated save of the same step: out of the way, deleted once replaced
        target.rename(root / f".old-{target.name}-{secrets.token_hex(4)}")
    (temporary / target.name).rename(target)
    durable.fsync_folder(root)
    durable.write_atomically(root / POINTER, target.name)
    clean(root)
    return target


def clean(root: Path) -> None:
    """Delete what unfinished saves and deletions left. Only the holder of the run's lock may call it."""
    if not root.is_dir():
        return
    for path in root.iterdir():
        if re.match(r"\.(tmp|old)-", path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(f".{POINTER}.") and path.is_file():
            path.unlink(missing_ok=True)


def retain(root: Path, keep: int) -> list[str]:
    """Delete all but the newest ``keep`` whole checkpoints; return the names deleted.

    One whose manifest or file lengths are wrong does not count towards ``keep``. Nothing is deleted unless a whole
    one stays.
    """
    whole, deleted = 0, []
    for path in published(root):
        if whole >= max(keep, 1):
            os.rename(path, root / f".old-{path.name}-{secrets.token_hex(4)}")  # first invisible, then gone
            deleted.append(path.name)
        elif _looks_whole(path):
            whole += 1
    clean(root)
    return deleted


def require_space(root: Path, needed: int) -> None:
    """Raise CheckpointError when ``root``'s disk has less than ``needed`` bytes free."""
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
