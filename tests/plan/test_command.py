"""`longctx plan` as a user meets it: answers without torch, tables, JSON, errors with a fix; presets that fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
BIG = "configs/llama-8b_1m_ring64-zero3_64-gpu.yaml"
BLOCKED = (
    "import sys\n"
    "for name in ('torch', 'deepspeed', 'transformers', 'triton', 'numpy', 'matplotlib'): sys.modules[name] = None\n"
    "from longctx.cli import main\n"
    "main(sys.argv[1:])\n"
)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_plan_is_printed() -> None:
    done = run("plan", BIG, "--machine", "h200")
    assert done.returncode == 0, done.stderr
    words = ("64 x h200", "16,384 on each rank", "fits", "kept results", "MFU", "longest", "to go further", "overlap")
    for word in words:
        assert word in done.stdout, word


def test_json_and_overrides() -> None:
    done = run("plan", BIG, "memory.recompute=none", "mesh.ring=32", "--nodes", 4, "--gpus-per-node", 8, "--json")
    assert done.returncode == 1, "without recomputation it does not fit"
    found = json.loads(done.stdout)
    assert found["ranks"]["world"] == 32 and found["memory"]["fits"] is False
    moments = found["memory"]["moments"]
    assert max(moment["total"] for moment in moments.values()) == found["memory"]["peak_bytes"]
    assert found["further"][0]["longest"] > found["longest"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--machine", "v100"), "choose one of a100"),
        (("--nodes", 3), "mesh is 64 ranks, but --nodes x --gpus-per-node is 24"),
    ],
)
def test_mistakes_are_named(arguments: tuple[object, ...], words: str) -> None:
    done = run("plan", BIG, *arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
