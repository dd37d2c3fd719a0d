"""DeepSpeed checkpoints of a sharded run: saved by four ranks, converted, continued by two (and by another split)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tiny import ragged_rows, run_ranks, tiny_llama

from tolerances import tolerance


def make(ring: int, stage: int, universal: bool) -> Any:
    import longctx

    settings = {
        "train_batch_size": 4,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 600},
        "checkpoint": {"load_universal": universal},
    }
    model = tiny_llama(num_hidden_layers=1)
    # A real learning rate, and moments: a checkpoint without optimizer state would go on differently.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
    return longctx.initialize(model, settings, longctx.Mesh(ring=ring), optimizer=optimizer)[0]


def steps(engine: Any, numbers: range) -> list[float]:
    """Steps whose global batch does not depend on the number of replicas: every replica takes the same rows."""
    losses = []
    for number in numbers:
        engine.backward(engine(**engine.shard(ragged_rows(number, 0, 0))).loss)
        engine.step()
        losses.append(engine.global_loss)
    return losses


def saved(rank: int, world: int, stage: int, folder: str) -> list[float]:
    engine = make(2, stage, universal=False)
    steps(engine, range(3))
    engine.save_checkpoint(folder, tag="three")
    losses = steps(engine, range(3, 6))
    engine.destroy()
    return losses


def continued(rank: int, world: int, ring: int, stage: int, folder: str, tag: str, universal: bool) -> list[float]:
    engine = make(ring, stage, universal)
    path, _ = engine.load_checkpoint(folder, tag=tag)
    assert path is not None
    losses = steps(engine, range(3, 6))
    engine.destroy()
    return losses


@pytest.mark.deep
@pytest.mark.parametrize("stage", [1, 3])
def test_four_ranks_save_and_two_go_on(stage: int, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    losses = run_ranks(4, saved, stage, str(folder))[0]
    for ring in (1, 4):  # the same world, split otherwise: no conversion
        for found in run_ranks(4, continued, ring, stage, str(folder), "three", False):
            torch.testing.assert_close(found, losses, rtol=tolerance("training loss"), atol=0)
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(folder / "three"), "--output_folder", str(folder / "three_universal")]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run([*convert, *folders, *workers], check=True, env={**os.environ, "DS_ACCELERATOR": "cpu"}, timeout=240)
    for ring in (2, 1):
        for found in run_ranks(2, continued, ring, stage, str(folder), "three_universal", True):
            torch.testing.assert_close(found, losses, rtol=tolerance("training loss"), atol=0)
