"""A run directory in which a run could not go on, or would start over unasked, is refused by name."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from tiny_run import config, losses, write

from longctx.errors import CheckpointError
from longctx.train import folder
from longctx.train.checkpoint import manifest, store
from longctx.train.run import run

from distributed import run_ranks

LIMIT = 280.0


def make(output: Path, steps: int = 12, saved: tuple[int, ...] = (10, 12)) -> Path:
    """Make a run directory with numbers of ``steps`` steps and bare checkpoints; return the folder of checkpoints."""
    root = output / folder.CHECKPOINTS
    for step in saved:
        (root / store.name_of(step)).mkdir(parents=True)
        (root / store.name_of(step) / manifest.NAME).write_text("{}")
    output.mkdir(exist_ok=True)
    (output / "metrics.jsonl").write_text("".join(json.dumps({"step": n + 1}) + "\n" for n in range(steps)))
    folder.note_saved(output, max(saved, default=0))
    return root


def test_a_folder_that_is_new_or_whole_is_usable(tmp_path: Path) -> None:
    folder.require_usable(tmp_path / "none")
    make(tmp_path / "whole")
    folder.require_usable(tmp_path / "whole")
    assert folder.lost(tmp_path / "whole") is None
    make(tmp_path / "killed before its first checkpoint", saved=())
    folder.require_usable(tmp_path / "killed before its first checkpoint")


def test_checkpoints_that_are_gone_stop_the_run(tmp_path: Path) -> None:
    for name, damage in {
        "all manifests": lambda root: [path.unlink() for path in root.glob("*/manifest.json")],
        "newest manifest": lambda root: (root / store.name_of(12) / manifest.NAME).unlink(),
        "all folders": lambda root: [shutil.rmtree(path) for path in root.glob("step-*")],
        "everything": shutil.rmtree,
        "a link": lambda root: (root.rename(root.with_name("away")), root.symlink_to("nowhere")),
        "a file": lambda root: (root.rename(root.with_name("away")), root.write_text("")),
        "a pointer that is a folder": lambda root: (root / store.POINTER).mkdir(),
    }.items():
        root = make(tmp_path / name)
        damage(root)
        with pytest.raises(CheckpointError, match=str(root)) as error:
            folder.require_usable(tmp_path / name)
        assert (
            "output.folder to start over" in str(error.value)
            or "move it away" in str(error.value)
            or ("remove the link" in str(error.value))
        ), name


@pytest.mark.parametrize("name", folder.FOLDERS + folder.FILES)
def test_what_is_in_the_way_of_the_run_is_named_before_it_starts(tmp_path: Path, name: str) -> None:
    (tmp_path / folder.CHECKPOINTS).mkdir()
    folder.require_usable(tmp_path)
    if name in folder.FOLDERS:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{tmp_path / name} is a .*; move it away"):
        folder.require_usable(tmp_path)


def test_steps_without_a_checkpoint_stop_the_run_unless_it_is_known_that_none_was_saved(tmp_path: Path) -> None:
    root = make(tmp_path, saved=())
    (tmp_path / folder.SAVED).unlink()
    with pytest.raises(CheckpointError, match=f"trained 12 steps .*but {root} holds no checkpoint"):
        folder.require_usable(tmp_path)
    (tmp_path / folder.SAVED).write_text("[damaged")
    with pytest.raises(CheckpointError, match="output.folder to start over"):
        folder.require_usable(tmp_path)
    folder.note_saved(tmp_path, 12)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="saved step 12"):
        folder.require_usable(tmp_path)


def test_a_newest_checkpoint_that_is_gone_is_said(tmp_path: Path) -> None:
    root = make(tmp_path)
    shutil.rmtree(root / store.name_of(12))
    folder.require_usable(tmp_path)
    assert (
        folder.lost(tmp_path)
        == "checkpoint step-00000012 was saved and is gone; the newest that is left is step-00000010"
    )


def train(rank: int, world: int, where: str, overrides: tuple[str, ...]) -> str:
    console = io.StringIO()
    try:
        run(config(Path(where), "output.sample_tokens=0", "output.plot=false", *overrides), console=console)
    except CheckpointError as error:
        return str(error)
    return console.getvalue()


@pytest.mark.deep
def test_a_run_does_not_start_over_when_its_checkpoints_are_lost_and_loads_what_it_verified(tmp_path: Path) -> None:
    write(tmp_path)
    output = tmp_path / "run"
    root = output / folder.CHECKPOINTS
    resolved = output / "config.yaml"
    run_ranks(2, train, str(tmp_path), ("train.steps=4", "train.schedule=constant"), timeout=LIMIT)
    assert folder.saved_step(output) == 4
    before, written = losses(output), resolved.read_text()

    # a manifest of step 4 under another name verifies file by file, and step 4 itself is damaged
    shutil.copytree(root / store.name_of(4), root / store.name_of(999))
    victim = next((root / store.name_of(4)).glob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-1])
    said = run_ranks(2, train, str(tmp_path), ("train.steps=5", "train.schedule=constant"), timeout=LIMIT)[0]
    assert "step-00000999: its manifest is that of step 4" in said
    assert "resuming from step-00000002, the newest valid checkpoint, instead of step-00000999" in said
    assert "2 steps after step 2 are dropped" in said
    shutil.rmtree(root / store.name_of(999))
    assert losses(output)[:4] == before and len(losses(output)) == 5

    # a refused resume changes nothing, and so does a start where the checkpoints are gone
    written = resolved.read_text()
    for answer in run_ranks(2, train, str(tmp_path), ("data.seed=7", "train.steps=6"), timeout=LIMIT):
        assert "data.seed 0, this run has 7" in answer
    os.rename(root, output / "lost")
    for answer in run_ranks(2, train, str(tmp_path), ("train.steps=6",), timeout=LIMIT):
        assert "saved step 5" in answer and "output.folder to start over" in answer
    assert resolved.read_text() == written and len(losses(output)) == 5 and not root.exists()
