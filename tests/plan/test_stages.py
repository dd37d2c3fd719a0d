"""Every stage of a run is planned: by `longctx plan`, by `longctx check`, and before the ranks start."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import run

from longctx.config.load import load
from longctx.plan.machines import MACHINES
from longctx.plan.stages import plan_stages

YAML = """
model: {architecture: llama, hidden_size: 1024, layers: 4, heads: 8, vocab_size: 8192, dtype: bf16}
mesh: {ring: 2, data: 1}
data: {sources: python-stdlib}
train:
  stages:
    - {sequence_length: 8Ki, steps: 100, global_batch: 8}
    - {sequence_length: 512Ki, steps: 10}
zero: {stage: 3}
output: {folder: runs/stages}
"""


def written(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def test_each_stage_is_planned_as_if_it_were_alone(tmp_path: Path) -> None:
    path = written(tmp_path)
    first, second = plan_stages(load(path), 2, MACHINES["h100"])
    assert first.setup.tokens == 8192 and first.setup.accumulation == 8 and second.setup.accumulation == 1
    unset = ["train.stages=[]", "train.steps=1", "data.sequence_length=8Ki", "train.global_batch=8"]
    (alone,) = plan_stages(load(path, unset), 2, MACHINES["h100"])
    assert (alone.peak, alone.seconds) == (first.peak, first.seconds)
    assert second.peak > first.peak and first.fits
    assert first.line.startswith("stage 1  steps 1 to 100, 8 rows of 8,192 tokens: ") and "fits" in first.line


def test_plan_and_check_show_every_stage(tmp_path: Path) -> None:
    path = str(written(tmp_path))
    shown = run("plan", path, "--memory", "6")
    assert "stage 1  steps 1 to 100" in shown.stdout and "stage 2  steps 101 to 110" in shown.stdout
    assert shown.returncode == 1 and "524,288 tokens: " in shown.stdout and "DOES NOT FIT" in shown.stdout
    found = json.loads(run("plan", path, "--json").stdout)
    assert [stage["tokens"] for stage in found["stages"]] == [8192, 524288] and found["tokens"]["row"] == 524288
    assert "stage 2  steps 101 to 110: 1 rows of 524,288 tokens" in run("check", path).stdout
