"""Go on with a checkpoint that another number of ranks saved: rank 0 converts it, all read, the copy is deleted.

The position in the data is a count of rows, so it means the same to any number of ranks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longctx.collectives import broadcast_json, ranks, together
from longctx.engine.zero import universal
from longctx.errors import CheckpointError
from longctx.train.checkpoint import rng, store
from longctx.train.checkpoint.manifest import Manifest, Progress
from longctx.train.checkpoint.safe_load import make_safe, safe_load


def load(root: Path, engine: Any, found: Manifest, say: Callable[[str], None]) -> Progress:
    """Restore the engine of this world from a verified checkpoint of another. All ranks call it together.

    Ranks that the checkpoint does not know keep fresh random states.

    Raises:
        CheckpointError: on every rank, if it cannot be converted or read.
    """
    rank, world = ranks()
    name = store.name_of(found.step)
    if engine.zero_nvme_offload_optimizer():
        raise CheckpointError(
            f"{root / name} was saved by {found.world.get('size')} ranks, this run has {world}: start as many, since "
            "what is offloaded to NVMe cannot be divided anew"
        )
    say(f"{name} was saved by {found.world.get('size')} ranks; dividing it anew for {world}")
    folder = _converted(root, found, rank, world)
    try:
        make_safe(engine, {})
        if not universal.load(engine, folder, safe_load):
            raise CheckpointError(f"{root / name}: DeepSpeed found nothing to load in it")
    finally:
        if rank == 0:
            shutil.rmtree(folder.parent, ignore_errors=True)
    if (root / name / rng.name_of(rank)).is_file():
        rng.load(root / name, rank)
    return Progress(found.step, found.samples, found.tokens)


def _converted(root: Path, found: Manifest, rank: int, world: int) -> Path:
    """Return the folder of the converted checkpoint, which rank 0 writes."""
    name, temporary = store.name_of(found.step), None
    with together():
        if rank == 0:
            try:
                store.require_space(root, 3 * found.total_bytes)  # slices of all ranks, then merged parameters
                temporary = store.begin(root, found.step)
                universal.convert(root / name, temporary / name, world, safe_load)
            except CheckpointError:
                _forget(temporary)
                raise
            except (OSError, RuntimeError, AssertionError, KeyError, ValueError) as error:
                _forget(temporary)
                raise CheckpointError(
                    f"{root / name} was saved by {found.world.get('size')} ranks and cannot be divided anew for "
                    f"{world} ({type(error).__name__}: {error}); start as many"
                ) from None
    return Path(broadcast_json(str(temporary))) / name


def _forget(temporary: Path | None) -> None:
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)
