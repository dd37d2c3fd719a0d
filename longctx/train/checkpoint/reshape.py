"""Resume from a checkpoint of a different number of ranks: rank 0 reshards a copy, all ranks load it.

The data position is a count of packed rows, so it does not depend on the number of ranks.
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
    """Restore the engine from a verified checkpoint of a different world size. All ranks call it together.

    Ranks beyond the saved world size keep their fresh random states.

    Raises:
        CheckpointError: on every rank, if the checkpoint cannot be resharded or read.
    """
    rank, world = ranks()
    name = store.name_of(found.step)
    if engine.zero_nvme_offload_optimizer():
        raise CheckpointError(
            f"{root / name} was saved by {found.world.get('size')} ranks, this run has {world}: state on NVMe cannot "
            "be resharded; start with the same number of ranks"
        )
    say(f"{name} was saved by {found.world.get('size')} ranks; resharding it for {world}")
    # DeepSpeed's "universal" format holds one file per parameter and optimizer state, without any sharding; each rank
    # loads its shard of it. Rank 0 writes it to a temporary folder, which is deleted after all ranks have loaded.
    folder = _converted(root, found, rank, world)
    try:
        make_safe(engine, {})  # DeepSpeed must not unpickle arbitrary objects here either
        if not universal.load(engine, folder, safe_load):
            raise CheckpointError(f"{root / name}: DeepSpeed found nothing to load in it")
    finally:
        if rank == 0:
            shutil.rmtree(folder.parent, ignore_errors=True)
    if (root / name / rng.name_of(rank)).is_file():
        rng.load(root / name, rank)
    return found.progress


def _converted(root: Path, found: Manifest, rank: int, world: int) -> Path:
    """Have rank 0 convert the checkpoint to DeepSpeed's universal format; return the folder on all ranks."""
    name, temporary = store.name_of(found.step), None
    with together():
        if rank == 0:
            try:
                # DeepSpeed first extracts every rank's slices, then merges them: both copies exist at the same time
                store.require_space(root, 3 * found.total_bytes)
                temporary = store.begin(root, found.step)
                universal.convert(root / name, temporary / name, world, safe_load)
            except CheckpointError:
                _forget(temporary)
                raise
            except (OSError, RuntimeError, AssertionError, KeyError, ValueError) as error:
                _forget(temporary)
                raise CheckpointError(
                    f"{root / name} was saved by {found.world.get('size')} ranks and cannot be resharded for {world} "
                    f"({type(error).__name__}: {error}); start with the same number of ranks"
                ) from None
    return Path(broadcast_json(str(temporary))) / name


def _forget(temporary: Path | None) -> None:
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)
