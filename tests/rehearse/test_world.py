"""`longctx rehearse`: a real training step as one rank of 64 sends and holds what `longctx plan` says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longctx.errors import ConfigError
from longctx.rehearse import world as rehearse

ROOT = Path(__file__).resolve().parents[2]
TEXT = """
model: {architecture: llama, hidden_size: 128, layers: 2, heads: 4, kv_heads: 2, vocab_size: 4096}
mesh: {ring: 64, data: 1}
data: {sources: python-stdlib, tokenizer: bytes, sequence_length: 4096}
train: {steps: 10}
zero: {stage: 3}
output: {folder: runs/rehearsed}
deepspeed: {zero_optimization: {reduce_bucket_size: 500_000}}
"""


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = folder / "run.yaml"
    path.write_text(TEXT)
    clean = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    return subprocess.run(
        [sys.executable, "-m", "longctx.cli", "rehearse", str(path), *words],
        cwd=ROOT, env=clean | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def rehearsed(folder: Path, *words: str) -> dict[str, Any]:
    done = command(folder, *words, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.rindex('{\n "rank"') :])
    return found


def check(found: dict[str, Any]) -> None:
    """Attention to the byte; collectives but for a few numbers (norms, losses); memory within a tenth."""
    for part in ("ring", "heads", "states"):
        assert found["sent"][part] == found["planned_sent"][part], part
    assert found["sent"]["zero"] == pytest.approx(found["planned_sent"]["zero"], rel=0.01)
    assert found["peak"] == pytest.approx(found["planned_peak"], rel=0.1)


def test_a_step_of_one_rank_of_64_is_foretold(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, "--rank", "31")
    assert (found["rank"], found["world"]) == (31, 64) and found["sent"]["ring"] > 1e7
    check(found)


ZERO = "deepspeed.zero_optimization.stage3_"
LET_GO = tuple(f"{ZERO}{key}=0" for key in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size",
                                            "param_persistence_threshold"))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("zero.group=8", *LET_GO, "--rank", "31"),
        ("zero.stage=2", "memory.recompute=layer_keep_attention", "mesh.ring=32", "mesh.ulysses=2", "--rank", "63"),
        ("zero.stage=1", "memory.recompute=layer", "--rank", "0"),
    ],
)
def test_other_switches_are_foretold_too(tmp_path: Path, words: tuple[str, ...]) -> None:
    check(rehearsed(tmp_path, *words))


def test_what_this_machine_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.layers=1"):
        rehearse._require_room(10**15, 1.0)
    with pytest.raises(ConfigError, match="too many for a CPU"):
        rehearse._require_room(1, 1e18)
    done = command(tmp_path, "--rank", "64")
    assert done.returncode == 2 and "give 0 to 63" in done.stderr
