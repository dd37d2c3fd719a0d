"""A resumed run that changed: new settings apply and are said, what the state cannot follow is refused by its key."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from tiny_run import config, losses, write

from longctx.errors import CheckpointError
from longctx.train.checkpoint import same_run
from longctx.train.checkpoint.manifest import Manifest
from longctx.train.loop import Loop
from longctx.train.run import run

from distributed import run_ranks

LIMIT = 280.0
CHANGED = ("train.weight_decay=0.5", "train.betas=[0.5, 0.7]", "train.eps=0.001", "train.lr=0.02", "train.steps=4")


def facts(folder: Path, *overrides: str, **more: Any) -> Manifest:
    given = config(folder, *overrides)
    run_facts = {"settings": same_run.settings_of(given), "optimizer": given.train.optimizer, "model": "a", "data": "b"}
    world = {"size": 2, "data": 1, "ring": 2, "ulysses": 1}
    return dataclasses.replace(
        Manifest(4, 4, given.data.seed, 9, world, given.attention.layout, given.zero.stage, "", "abc", {}, run_facts),
        **more,
    )


REFUSED = {
    "zero.stage=1": "zero.stage 3, this run has 1",
    "data.seed=5": "data.seed 0, this run has 5",
    "model.layers=3": "model.layers 2, this run has 3",
    "model.dtype=bf16": "model.dtype fp32, this run has bf16",
    "data.sequence_length=64": "data.sequence_length 96, this run has 64",
    "data.packing=concat": "data.packing best_fit, this run has concat",
    "attention.layers={'1': cosine}": "attention.layers {}, this run has",
    "train.optimizer=sgd": "train.optimizer adamw, this run has sgd",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_setting_that_the_state_cannot_follow_is_refused_by_its_key(tmp_path: Path, override: str) -> None:
    write(tmp_path)
    with pytest.raises(CheckpointError) as error:
        same_run.require_settings("step-4", facts(tmp_path), facts(tmp_path, override))
    assert REFUSED[override] in str(error.value) and "choose another output.folder to start over" in str(error.value)
    same_run.require_settings("step-4", facts(tmp_path, override), facts(tmp_path, override))


def test_every_refused_setting_is_named_at_once(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(CheckpointError, match="data.seed 0, this run has 2.*zero.stage 3, this run has 1") as error:
        same_run.require_settings("step-4", facts(tmp_path), facts(tmp_path, "zero.stage=1", "data.seed=2"))
    assert str(error.value).count("set it back") == 2


ANNOUNCED = {
    "train.weight_decay=0.3": "train.weight_decay 0.1, now 0.3",
    "train.schedule=linear": "train.schedule cosine, now linear",
    "train.seed=4": "train.seed 0, now 4",
    "memory.recompute=layer": "memory.recompute none, now layer",
    "zero.offload_optimizer=cpu": "zero.offload_optimizer none, now cpu",
    "attention.layout=striped": "attention.layout zigzag, now striped",
    "data.held_out=0.3": "data.held_out 0.2, now 0.3",
    "deepspeed={wall_clock_breakdown: true}": "deepspeed {}, now {wall_clock_breakdown: true}",
}


@pytest.mark.parametrize("override", ANNOUNCED)
def test_a_setting_that_applies_is_said_once_and_nothing_else_is(tmp_path: Path, override: str) -> None:
    write(tmp_path)
    said: list[str] = []
    same_run.require_settings("step-4", facts(tmp_path), facts(tmp_path, override))
    same_run.announce("step-4", facts(tmp_path), facts(tmp_path, override), said.append)
    assert said == [f"step-4 was saved with {ANNOUNCED[override]}"]


def test_versions_code_and_world_are_said_and_other_contents_refused(tmp_path: Path) -> None:
    write(tmp_path)
    before = facts(tmp_path, versions={"torch": "2.1", "numpy": "1"})
    now = facts(tmp_path, versions={"torch": "2.2", "numpy": "1"}, git_commit="def", world={"size": 4, "ring": 4})
    said: list[str] = []
    same_run.announce("step-4", before, now, said.append)
    assert [line.removeprefix("step-4 was saved with ") for line in said] == [
        "mesh.ring 2, now 4", "ranks 2, now 4", "code abc, now def", 'version of torch "2.1", now "2.2"',
    ]  # fmt: skip
    for what in ("model", "data"):
        other = dataclasses.replace(now, run=now.run | {what: "c"})
        with pytest.raises(CheckpointError, match=f"the {what} [ab], this run has c"):
            same_run.require_content("step-4", before, other)


def test_a_checkpoint_without_settings_is_compared_by_its_facts(tmp_path: Path) -> None:
    write(tmp_path)
    old = facts(tmp_path, run={"optimizer": "adamw", "threads": 1})
    said: list[str] = []
    same_run.announce("step-4", old, facts(tmp_path, "train.lr=1"), said.append)
    assert not said
    with pytest.raises(CheckpointError, match=r"train.optimizer adamw, this run has sgd"):
        same_run.require_settings("step-4", old, facts(tmp_path, "train.optimizer=sgd"))


def test_another_number_of_ranks_needs_adamw(tmp_path: Path) -> None:
    write(tmp_path)
    two, four = ({"world": {"size": size}} for size in (2, 4))
    same_run.require_settings("step-4", facts(tmp_path, **two), facts(tmp_path, **four))
    sgd = "train.optimizer=sgd"
    with pytest.raises(CheckpointError, match="was saved by 4 ranks, this run has 2, and only the state of adamw"):
        same_run.require_settings("step-4", facts(tmp_path, sgd, **four), facts(tmp_path, sgd, **two))


def resumed(rank: int, world: int, folder: str, stage: int) -> list[Any]:
    """Train two steps, resume with other settings; return those of each group at every later step, and what is said."""
    groups: list[Any] = []
    step = Loop._step

    def watched(loop: Loop) -> dict[str, Any]:
        record = step(loop)
        for group in loop.job.engine.optimizer.param_groups:
            groups.append([group["weight_decay"], *group["betas"], group["eps"]])
        return record

    common = (f"zero.stage={stage}", "output.sample_tokens=0", "train.schedule=constant", "train.eval_every=0")
    for name in ("changed", "kept"):
        assert run(config(Path(folder), *common, "train.steps=2", name=name)) == 0
    console = io.StringIO()
    Loop._step = watched  # type: ignore[method-assign]
    try:
        assert run(config(Path(folder), *common, *CHANGED, name="changed"), console=console) == 0
    finally:
        Loop._step = step  # type: ignore[method-assign]
    assert run(config(Path(folder), *common, "train.lr=0.02", "train.steps=4", name="kept")) == 0
    return [groups, console.getvalue()]


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.deep)])
def test_changed_settings_of_the_optimizer_apply_on_resume_and_are_said(tmp_path: Path, stage: int) -> None:
    write(tmp_path, "changed"), write(tmp_path, "kept")
    groups, said = run_ranks(2, resumed, str(tmp_path), stage, timeout=LIMIT)[0]
    assert groups and {tuple(group[1:]) for group in groups} == {(0.5, 0.7, 0.001)}
    assert {group[0] for group in groups} == {0.5, 0.0}  # matrices and vectors
    for line in (
        "train.weight_decay 0.1, now 0.5",
        "train.betas [0.9, 0.95], now [0.5, 0.7]",
        "train.lr 0.01, now 0.02",
    ):
        assert f"step-00000002 was saved with {line}\n" in said
    changed, kept = losses(tmp_path / "changed"), losses(tmp_path / "kept")
    assert changed[:3] == kept[:3] and changed[3] != kept[3]
