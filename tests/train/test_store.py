"""Publication is one rename; retention and cleaning never take the only whole checkpoint."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
from pathlib import Path

import pytest

from longctx.errors import CheckpointError
from longctx.train import durable
from longctx.train.checkpoint import manifest, store
from longctx.train.checkpoint.manifest import FileEntry, Manifest

EMPTY = Manifest(0, 0, 0, 0, {"size": 1}, "zigzag", 1, "", None, {})


def save(root: Path, step: int, publish: bool = True) -> Path:
    temporary = store.begin(root, step)
    folder = temporary / store.name_of(step)
    (folder / "a.pt").write_bytes(os.urandom(8))
    entry = FileEntry("a.pt", 8, durable.sha256_of(folder / "a.pt"), 0)
    manifest.write_manifest(folder, dataclasses.replace(EMPTY, step=step, files=(entry,)))
    return store.publish(temporary, step) if publish else temporary


def whole(root: Path) -> list[str]:
    found = []
    for path in store.published(root):
        try:
            manifest.verify_files(path, manifest.read_manifest(path))
            found.append(path.name)
        except CheckpointError:
            pass
    return found


def test_newest_first_and_pointer(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        save(tmp_path, step)
    assert [path.name for path in store.published(tmp_path)] == ["step-00000100", "step-00000020", "step-00000005"]
    assert (tmp_path / store.POINTER).read_text() == "step-00000100"


def test_an_unpublished_save_is_invisible_and_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 5)
    temporary = save(tmp_path, 10, publish=False)
    assert whole(tmp_path) == ["step-00000005"]
    store.clean(tmp_path)
    assert not temporary.exists() and whole(tmp_path) == ["step-00000005"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (save(tmp_path, 5) / "a.pt").write_bytes(b"")
    assert whole(tmp_path) == []
    save(tmp_path, 5)
    assert whole(tmp_path) == ["step-00000005"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005"]


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    assert store.retain(tmp_path, 2) == ["step-00000003", "step-00000002", "step-00000001"]
    assert whole(tmp_path) == ["step-00000005", "step-00000004"]


def test_retention_never_deletes_the_only_good_one(tmp_path: Path) -> None:
    """Random saves, interrupted saves and damage: where a whole checkpoint existed before retention, one is left."""
    chance = random.Random(7)
    for trial in range(40):
        root = tmp_path / str(trial)
        for step in range(1, 8):
            event = chance.choice(["save", "save", "interrupted", "damage", "clean"])
            if event == "save":
                save(root, step)
            elif event == "interrupted":
                save(root, step, publish=False)
            elif event == "damage" and store.published(root):
                (chance.choice(store.published(root)) / "a.pt").write_bytes(b"short")
            elif event == "clean":
                store.clean(root)
            before = whole(root)
            store.retain(root, chance.randint(1, 3))
            assert bool(whole(root)) == bool(before)


def test_a_folder_with_the_manifest_of_another_step_is_no_checkpoint(tmp_path: Path) -> None:
    """Neither for a reader nor for retention, which would keep it in place of a real one."""
    for step in (10, 12):
        save(tmp_path, step)
    shutil.copytree(tmp_path / store.name_of(12), tmp_path / store.name_of(999))
    with pytest.raises(CheckpointError, match="step-00000999: its manifest is that of step 12"):
        store.read(tmp_path / store.name_of(999))
    assert store.retain(tmp_path, 1) == [store.name_of(10)]
    assert store.read(tmp_path / store.name_of(12)).step == 12


def test_too_little_space_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="MiB free"):
        store.require_space(tmp_path, 2**60)
    store.require_space(tmp_path, 1)
