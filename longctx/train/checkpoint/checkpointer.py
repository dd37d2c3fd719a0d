"""Save and load a run's checkpoints on all ranks.

Save: every rank writes its files into a hidden folder, flushes them to the disk and hashes them; then rank 0 writes the
manifest and publishes the folder by a rename. A kill at any moment leaves the older checkpoints intact and, at worst, a
hidden folder that the next start deletes. Load: the newest checkpoint that verifies on all ranks; damaged ones are
skipped with a notice, and if none is valid an error is raised, never a silent start from step 0.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from longctx.collectives import broadcast_json, gather_json, ranks, together
from longctx.engine.zero import nvme
from longctx.errors import CheckpointError
from longctx.train import durable
from longctx.train import folder as folder_of_run
from longctx.train.checkpoint import manifest, reshape, rng, same_run, store
from longctx.train.checkpoint.manifest import FileEntry, Manifest, Progress
from longctx.train.checkpoint.safe_load import make_safe, safe_load
from longctx.train.optimizer import own_settings

# fp32 weights and Adam's two moments take 12 bytes per parameter, half-precision weights 2 more; the rest is a margin
BYTES_PER_PARAMETER = 16
Say = Callable[[str], None]


class Checkpoints:
    """The checkpoints of one run. Every rank has one, and all ranks call its methods together.

    Args:
        root: the folder, on storage that all ranks share.
        keep: number of checkpoints to keep.
        facts: the manifest that a checkpoint of this run has, without progress and files. One that differs is
            rejected, or the change is printed (``same_run``). The hashes of model and data may be set between ``find``
            and ``require_content``.
        say: prints notices for the user.
    """

    def __init__(self, root: Path, keep: int, facts: Manifest, say: Say) -> None:
        self.root, self.keep, self.facts, self.say = root, keep, facts, say

    def save(self, engine: Any, progress: Progress) -> Path:
        """Save the engine and random states as ``step-…`` and return the published folder.

        Raises:
            CheckpointError: on every rank, if any could not write. Older checkpoints are intact, the new one deleted.
        """
        temporary = self._begin(engine, progress.step)
        try:
            entries = self._write(engine, temporary, progress.step)
            return self._publish(temporary, progress, entries)
        except BaseException:
            if ranks()[0] == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def find(self, resume: str) -> Manifest | None:
        """Return the manifest of the newest checkpoint that verifies on all ranks, or None to start from step 0.

        Args:
            resume: ``auto``, ``must`` or ``never``.

        Raises:
            CheckpointError: ``must`` without a checkpoint, ``never`` with one, all are damaged, or the newest valid one
                belongs to a run with incompatible settings.
        """
        names: list[str] = broadcast_json([path.name for path in store.published(self.root)])
        if resume == "never" and names:
            raise CheckpointError(
                f"{self.root} already holds {names[0]}, and checkpoint.resume is never: a folder holds one run only; "
                "choose another output.folder, or delete this one"
            )
        for name in names:
            try:
                found = self._verify(self.root / name)
            except CheckpointError as error:
                self.say(f"checkpoint {name} is not used: {error}")
                continue
            if name != names[0]:
                self.say(f"resuming from {name}, the newest valid checkpoint, instead of {names[0]}")
            same_run.require_settings(str(self.root / name), found, self.facts)
            return found
        if names:
            raise CheckpointError(
                f"{self.root}: none of {len(names)} checkpoints is valid (reasons above); restore one from a copy, or "
                f"{folder_of_run.START_OVER}"
            )
        if resume == "must":
            raise CheckpointError(
                f"{self.root} holds no checkpoint, and checkpoint.resume is must; set it to auto to start from step 0"
            )
        return None

    def require_content(self, found: Manifest) -> None:
        """Compare a checkpoint with the model and data of ``facts``; print all other changes.

        Args:
            found: returned by ``find``.

        Raises:
            CheckpointError: the model or the data differ.
        """
        name = store.name_of(found.step)
        same_run.require_content(str(self.root / name), found, self.facts)
        same_run.announce(name, found, self.facts, self.say)

    def load(self, engine: Any, found: Manifest) -> Progress:
        """Restore the engine and random states from a checkpoint that ``find`` returned.

        The optimizer keeps this run's settings (learning rate, betas, …), not the checkpoint's.

        Raises:
            CheckpointError: a file contains more than plain data, or does not fit the engine.
        """
        with own_settings(engine.optimizer):
            return self._load(engine, found)

    def _load(self, engine: Any, found: Manifest) -> Progress:
        name = store.name_of(found.step)
        if engine.load_universal_checkpoint():
            raise CheckpointError("deepspeed.checkpoint.load_universal reads with pickle, which runs code; remove it")
        self._require_same_swapping(engine, name, found)
        if found.world.get("size") != ranks()[1] and found.zero_stage > 0:
            return reshape.load(self.root, engine, found, self.say)
        contents: dict[str, Any] = {}
        # Read every file before DeepSpeed does, so that a damaged file raises on all ranks: a rank that failed inside
        # DeepSpeed would leave the others waiting in a collective.
        with together():
            for entry in found.files:  # the files DeepSpeed reads on this rank: its own, and the replicated one
                own = entry.rank == ranks()[0] or entry.path.startswith("mp_rank_")
                if own and entry.path.endswith(".pt") and not entry.path.startswith(nvme.PREFIX):
                    path = str(self.root / name / entry.path)
                    contents[path] = safe_load(path, "cpu")
        make_safe(engine, contents)

        def restored() -> None:
            with together():
                nvme.restore(engine, self.root / name, safe_load)

        with nvme.loading(engine, restored):
            strict = not frozen(engine.module)  # frozen weights are those of the folder, not of the checkpoint
            path, _ = engine.load_checkpoint(
                str(self.root), tag=name, load_lr_scheduler_states=False, load_module_strict=strict
            )
        if path is None:
            raise CheckpointError(f"{self.root / name}: DeepSpeed found nothing to load in it")
        with together():
            rng.load(self.root / name, ranks()[0])
        return found.progress

    def _require_same_swapping(self, engine: Any, name: str, found: Manifest) -> None:
        before = any(entry.path.startswith(nvme.PREFIX) for entry in found.files)
        if before != nvme.swaps(engine):
            was, now = ("with", "without") if before else ("without", "with")
            raise CheckpointError(
                f"{self.root / name} was saved {was} zero.offload_optimizer: nvme, this run is {now}: set it back, or "
                f"{folder_of_run.START_OVER}"
            )

    # ------------------------------------------------------------------------------------------------ save, in steps

    def _begin(self, engine: Any, step: int) -> Path:
        saved = (p for p in engine.module.parameters() if p.requires_grad)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in saved)
        folder = None
        with together():
            if ranks()[0] == 0:
                try:
                    folder = store.begin(self.root, step)
                    store.require_space(self.root, BYTES_PER_PARAMETER * parameters + 2**20)
                except (OSError, CheckpointError) as error:
                    if folder is not None:
                        shutil.rmtree(folder, ignore_errors=True)
                    raise _named(error, self.root) from None
        return Path(broadcast_json(str(folder)))

    def _write(self, engine: Any, temporary: Path, step: int) -> list[FileEntry]:
        """Write this rank's files, flush them to the disk, and return the entries of all ranks' files."""
        folder = temporary / store.name_of(step)
        written, failure = _save_engine(engine, temporary, folder.name)
        entries = []
        with together():
            if failure is not None:
                raise _named(failure, folder)
            try:
                written.append(rng.save(folder, ranks()[0]))
                for path in written:
                    durable.fsync_file(path)
                    entry = FileEntry(path.name, path.stat().st_size, durable.sha256_of(path), ranks()[0])
                    entries.append([entry.path, entry.bytes, entry.sha256, entry.rank])
            except OSError as error:
                raise _named(error, folder) from None
        return sorted((FileEntry(*entry) for row in gather_json(entries) for entry in row), key=lambda e: e.path)

    def _publish(self, temporary: Path, progress: Progress, entries: list[FileEntry]) -> Path:
        folder = temporary / store.name_of(progress.step)
        with together():
            if ranks()[0] == 0:
                begin = {manifest.STAGE_BEGIN: progress.stage_begin} if progress.stage_begin else {}
                full = replace(
                    self.facts,
                    run=self.facts.run | begin,
                    step=progress.step,
                    samples=progress.samples,
                    tokens=progress.tokens,
                    files=tuple(entries),
                )
                try:
                    manifest.write_manifest(folder, full)
                    manifest.verify_files(folder, full, hash_ranks=())
                    store.publish(temporary, progress.step)
                    folder_of_run.note_saved(self.root.parent, progress.step)
                    store.retain(self.root, self.keep)
                except OSError as error:
                    raise _named(error, folder) from None
        return self.root / folder.name

    # ------------------------------------------------------------------------------------------------ load, in steps

    def _verify(self, folder: Path) -> Manifest:
        """Read the manifest and check the files; every rank hashes a part, and all raise if any finds damage."""
        rank, world = ranks()
        digest, found = "", self.facts
        with together():
            found = store.read(folder)
            # a rank hashes the files it will read (its own and rank 0's); files of ranks beyond this world are divided
            absent = {entry.rank for entry in found.files if entry.rank >= world and entry.rank % world == rank}
            manifest.verify_files(folder, found, hash_ranks={rank, 0} | absent)
            digest = durable.sha256_of(folder / manifest.NAME)
        if len(set(gather_json(digest))) > 1:
            raise CheckpointError(f"{folder}: ranks see different manifests; put it on storage that all ranks share")
        return found


def _save_engine(engine: Any, temporary: Path, tag: str) -> tuple[list[Path], Exception | None]:
    """Have DeepSpeed write this rank's files; return them, and the first write error instead of raising it.

    The other ranks are inside DeepSpeed's collectives: this rank must reach them too, even if a write failed.
    DeepSpeed's recovery script is not copied: a checkpoint holds data, not code.
    """
    written: list[Path] = []
    failures: list[Exception] = []
    writer = engine.checkpoint_engine
    original = writer.save

    def save(state_dict: Any, path: str) -> None:
        written.append(Path(path))
        try:
            original(state_dict, path)
        except (OSError, RuntimeError) as error:
            failures.append(error)

    writer.save = save
    engine._copy_recovery_script = lambda path: None
    try:
        with nvme.saving(engine):
            apart = frozen(engine.module)
            engine.save_checkpoint(str(temporary), tag=tag, save_latest=False, exclude_frozen_parameters=apart)
    finally:
        del writer.save, engine._copy_recovery_script
    return written, failures[0] if failures else None


def frozen(module: Any) -> bool:
    """Return whether some of a model's weights are not trained."""
    return any(not parameter.requires_grad for parameter in module.parameters())


def _named(error: Exception, folder: Path) -> CheckpointError:
    """Return a CheckpointError that names the folder, the reason and the free space."""
    if isinstance(error, CheckpointError):
        return error
    free = shutil.disk_usage(folder if folder.is_dir() else Path("/")).free
    return CheckpointError(
        f"the checkpoint could not be written to {folder} ({str(error).splitlines()[0]}); the disk has "
        f"{free / 2**20:,.0f} MiB free. Older checkpoints are intact, the unfinished one is removed"
    )
