"""The command `longctx plan`: no torch needed, tables, JSON, errors with a fix, and presets that fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from longctx.config.derived import derive, world_size
from longctx.config.load import load
from longctx.plan.machines import MACHINES
from longctx.plan.plan import as_json, make_plan
from longctx.plan.setup import setup_of
from longctx.plan.shape import shape_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
BIG = "configs/llama-8b_1m_ring64-zero3_64-gpu.yaml"
BLOCKED = (
    "import sys\n"
    "for name in ('torch', 'deepspeed', 'transformers', 'triton', 'numpy', 'matplotlib'): sys.modules[name] = None\n"
    "from longctx.cli.main import main\n"
    "main(sys.argv[1:])\n"
)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_plan_is_printed() -> None:
    done = run("plan", BIG, "--machine", "h200")
    assert done.returncode == 0, done.stderr
    words = (
        "64 x h200",
        "16,384 per rank",
        "fits",
        "saved activations",
        "MFU",
        "longest",
        "for longer sequences",
        "overlap",
    )
    for word in words:
        assert word in done.stdout, word


def test_json_and_overrides() -> None:
    kept = ("memory.recompute=none", "memory.recompute_norms=false")
    done = run("plan", BIG, *kept, "mesh.ring=32", "--nodes", 4, "--gpus-per-node", 8, "--json")
    assert done.returncode == 1, "without recomputation it does not fit"
    found = json.loads(done.stdout)
    assert found["ranks"]["world"] == 32 and found["memory"]["fits"] is False
    moments = found["memory"]["moments"]
    assert max(moment["total"] for moment in moments.values()) == found["memory"]["peak_bytes"]
    assert found["further"][0]["longest"] > found["longest"]
    assert {"kept results", "layer at work"} <= {part for moment in moments.values() for part in moment}
    assert {"products", "attention", "optimizer"} <= set(found["step"]["seconds_by"])  # keys do not follow the tables


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--machine", "v100"), "choose one of a100"),
        (("--nodes", 3), "mesh has 64 ranks, but --nodes x --gpus-per-node is 24"),
    ],
)
def test_mistakes_are_named(arguments: tuple[object, ...], words: str) -> None:
    done = run("plan", BIG, *arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_has_a_plan_and_fits_its_hardware(path: Path) -> None:
    """The last word of a file's name is its hardware: 8-h100; GPUs without a name have 80 GB."""
    named = path.stem.rpartition("-")[2]
    machine = named if named in MACHINES else "cpu" if "gpu" not in named else "h100"
    config = load(path, default_world=MACHINES[machine].per_node)
    shape = shape_of(config)
    derived = derive(config, world_size(config, MACHINES[machine].per_node))
    setup = setup_of(config, derived, shape, on_gpu=machine != "cpu")
    plan = make_plan(shape, setup, MACHINES[machine])
    assert plan.fits and plan.longest >= setup.tokens, plan.step_bytes.peak
    assert json.dumps(as_json(plan))
    for name, least in (("_1m_", 2**20), ("_8m_", 2**23), ("_32m_", 2**25)):
        assert name not in path.stem or "llama-8b" not in path.stem or setup.tokens >= least
