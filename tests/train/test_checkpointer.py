"""The protocol of saving: what is on the disk before what, who hashes what, what room is asked for, what is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longctx.errors import CheckpointError
from longctx.train import durable, folder
from longctx.train.checkpoint import checkpointer as checkpoint
from longctx.train.checkpoint import manifest, store
from longctx.train.checkpoint.checkpointer import Checkpoints
from longctx.train.checkpoint.manifest import Manifest, Progress

from distributed import run_ranks

FACTS = Manifest(0, 0, 0, 0, {"size": 1}, "zigzag", 1, "", None, {}, {"optimizer": "adamw"})
FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")


class Crash(BaseException):
    """Nothing after it runs, as after a power cut."""


class Writer:
    def save(self, state_dict: Any, path: str) -> None:
        Path(path).write_bytes(state_dict)


class StubEngine:
    """What ``save`` needs of a DeepSpeed engine: two files, and a model whose size is asked for."""

    def __init__(self) -> None:
        self.checkpoint_engine = Writer()
        self.module = torch.nn.Linear(10, 10)
        self.optimizer = None

    def save_checkpoint(self, root: str, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        assert not exclude_frozen_parameters  # the whole model is trained here
        assert not save_latest  # DeepSpeed would move the pointer before the checkpoint is there
        for name in FILES:
            self.checkpoint_engine.save(os.urandom(64), str(Path(root, tag, name)))


def make(root: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(root / folder.CHECKPOINTS, keep, FACTS, lambda text: None)


def save(checkpoints: Checkpoints, step: int) -> Path:
    return checkpoints.save(StubEngine(), Progress(step, step, step))


def calls(monkeypatch: pytest.MonkeyPatch, crash_at: int = 0) -> list[tuple[str, str]]:
    """Note every fsync, rename and replace from now on: (what, path). Crash before the one numbered ``crash_at``."""
    seen: list[tuple[str, str]] = []

    def noted(name: str, original: Callable[..., Any], path: Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if crash_at and len(seen) + 1 >= crash_at:
                raise Crash
            seen.append((name, path(*arguments)))
            return original(*arguments, **options)

        return call

    monkeypatch.setattr(os, "fsync", noted("fsync", os.fsync, lambda file: os.readlink(f"/proc/self/fd/{file}")))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name), lambda source, target: str(target)))
    return seen


def test_everything_is_on_the_disk_before_it_is_published_and_published_before_it_is_pointed_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = make(tmp_path)
    seen = calls(monkeypatch)
    published = save(checkpoints, 4)
    step, root = store.name_of(4), str(checkpoints.root)
    rename = seen.index(("rename", str(published)))
    pointer = seen.index(("replace", str(checkpoints.root / store.POINTER)))
    before = [Path(path) for what, path in seen[:rename] if what == "fsync"]
    for name in (*FILES, "rng-00000.json"):
        assert any(path.name == name or path.name.startswith(f".{name}.") for path in before), f"{name} is not pushed"
    assert any(path.name.startswith(f".{manifest.NAME}.") for path in before)
    last_write = max(
        n for n, (what, path) in enumerate(seen[:rename]) if what == "replace" or Path(path).suffix == ".pt"
    )
    folders = [n for n, (what, path) in enumerate(seen) if what == "fsync" and Path(path).name == step]
    assert any(last_write < n < rename for n in folders), "the folder's list of names is not pushed before the rename"
    assert ("fsync", root) in seen[rename:pointer], "the rename is not pushed before the pointer moves"
    assert ("fsync", root) in seen[pointer:]


@pytest.mark.parametrize("first", [False, True])
def test_a_crash_at_any_moment_leaves_a_valid_pointer_and_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    for crash_at in range(1, 60):
        checkpoints = make(tmp_path / str(crash_at), keep=1)
        if not first:
            save(checkpoints, 2)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # nothing cleans up after a power cut
            seen = calls(patch, crash_at)
            try:
                save(checkpoints, 4)
                break
            except Crash:
                pass
        assert len(seen) == crash_at - 1
        left = store.published(checkpoints.root)
        for path in left:
            manifest.verify_files(path, manifest.read_manifest(path))
        pointer = checkpoints.root / store.POINTER
        assert not pointer.exists() or pointer.read_text() in {path.name for path in left}, f"crash {crash_at}"
        assert first or left, f"crash {crash_at} took the only checkpoint"
        saved = folder.saved_step(checkpoints.root.parent)
        assert saved is None or saved <= store.step_of(left[0]), f"crash {crash_at}: step {saved} was never published"
    else:
        raise AssertionError("saving does more than the test expects")
    assert crash_at > 8


def test_only_the_newest_are_kept_and_the_last_saved_step_is_written_down(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, keep=2)
    for step in (2, 4, 6, 8):
        save(checkpoints, step)
    assert [path.name for path in store.published(checkpoints.root)] == [store.name_of(8), store.name_of(6)]
    assert {path.name for path in checkpoints.root.iterdir()} == {store.name_of(8), store.name_of(6), store.POINTER}
    assert folder.saved_step(tmp_path) == 8


def test_room_for_weights_and_both_moments_is_asked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = make(tmp_path)
    save(checkpoints, 2)
    needed = 16 * 110 + 2**20  # fp32 weights, two moments, half-precision weights; and a little
    for free, good in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(store.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if good:
            save(checkpoints, 4)
        else:
            with pytest.raises(CheckpointError, match="a checkpoint needs about"):
                save(checkpoints, 4)
            assert {path.name for path in checkpoints.root.iterdir()} == {store.name_of(2), store.POINTER}


def test_must_needs_a_checkpoint_and_never_needs_none(tmp_path: Path) -> None:
    checkpoints = make(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint, and checkpoint.resume is must"):
        checkpoints.find("must")
    assert checkpoints.find("never") is None and checkpoints.find("auto") is None
    save(checkpoints, 2)
    with pytest.raises(CheckpointError, match="already holds step-00000002, and checkpoint.resume is never"):
        checkpoints.find("never")
    for resume in ("must", "auto"):
        found = checkpoints.find(resume)
        assert found is not None and found.step == 2


def test_a_manifest_of_another_step_is_not_used(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = make(tmp_path)
    checkpoints.say = said.append
    shutil.copytree(save(checkpoints, 12), checkpoints.root / store.name_of(999))
    found = checkpoints.find("auto")
    assert found is not None and found.step == 12
    assert "its manifest is that of step 12" in said[0] and "instead of step-00000999" in said[1]
    for name in ("step-000000012", "step-00000013"):
        shutil.copytree(checkpoints.root / store.name_of(12), checkpoints.root / name)
    found = checkpoints.find("auto")
    assert found is not None and found.step == 12


def verified(rank: int, world: int, root: str) -> list[int | None]:
    """Alter each of six ranks' files, one after another; return the step that is found each time."""
    where = Path(root) / store.name_of(8)
    steps = []
    for index in range(6):
        path = where / f"rank-{index}.pt"
        torch.distributed.barrier()
        if rank == 0:
            path.write_bytes(b"x" + path.read_bytes()[1:])
        torch.distributed.barrier()
        checkpoints = Checkpoints(Path(root), 2, FACTS, lambda text: None)
        try:
            found = checkpoints.find("auto")
            steps.append(found.step if found else None)
        except CheckpointError as error:
            steps.append(-1 if "none of 1 checkpoints is valid" in str(error) else None)
        torch.distributed.barrier()
        if rank == 0:
            path.write_bytes(b"a" + path.read_bytes()[1:])
    return steps


def test_files_of_ranks_that_are_not_there_any_more_are_hashed_too(tmp_path: Path) -> None:
    where = tmp_path / store.name_of(8)
    where.mkdir()
    entries = []
    for index in range(6):
        (where / f"rank-{index}.pt").write_bytes(b"a" * 50)
        entries.append(manifest.FileEntry(f"rank-{index}.pt", 50, durable.sha256_of(where / f"rank-{index}.pt"), index))
    facts = Manifest(8, 8, 0, 8, {"size": 6}, "zigzag", 1, "", None, {}, {"optimizer": "adamw"}, tuple(entries))
    manifest.write_manifest(where, facts)
    assert run_ranks(2, verified, str(tmp_path)) == [[-1] * 6] * 2
