"""A process that joins others ends cleanly; a process without a launcher is a world of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch, torch.distributed as dist
from longctx.mesh import Mesh

mesh = Mesh(ring=2)
mesh.connect()
for _ in range(20):
    dist.all_gather([torch.empty(4) for _ in range(2)], torch.ones(4), group=mesh.sequence_group)
"""


def started(folder: Path, rank: int) -> subprocess.Popen[str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    code = "import torch.distributed as dist\nimport os\nos.environ.update(MASTER_ADDR='', MASTER_PORT='')\n"
    code += f"dist.init_process_group('gloo', init_method='file://{folder}/meet', rank={rank}, world_size=2)\n{SCRIPT}"
    environment = os.environ | place | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("pairs", [1, pytest.param(6, marks=pytest.mark.deep)])
def test_a_script_that_ends_right_after_a_collective_ends_well(tmp_path: Path, pairs: int) -> None:
    """One rank in three aborted (exit code 134) while gloo's threads still held tensors: twelve ranks show it."""
    for pair in range(pairs):
        folder = tmp_path / str(pair)
        folder.mkdir()
        ranks = [started(folder, rank) for rank in range(2)]
        for rank in ranks:
            _, said = rank.communicate(timeout=120)
            assert rank.returncode == 0, said


ENGINE = """
import json, os
import torch
import longctx

model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
settings = {
    "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 5000},
}
before = dict(os.environ)
engine, *_ = longctx.initialize(model, settings, longctx.Mesh(), optimizer=optimizer)
engine.backward(engine(torch.ones(1, 2)).sum())
engine.step()
changed = {name: os.environ[name] for name, value in before.items() if os.environ[name] != value}
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
print(json.dumps([changed, {name: os.environ[name] for name in names if name in os.environ}]))
"""


OWN = {"LOCAL_RANK": "1", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "192.0.2.1"}


@pytest.mark.parametrize(
    ("own", "after"),
    [
        ({}, {"LOCAL_RANK": "0"}),
        (OWN, OWN),
        pytest.param({"SLURM_LOCALID": "3"}, {"LOCAL_RANK": "3"}, marks=pytest.mark.deep),
    ],
    ids=["plain", "own", "slurm"],
)
def test_a_script_without_a_launcher_trains_with_deepspeed(own: dict[str, str], after: dict[str, str]) -> None:
    """DeepSpeed requires LOCAL_RANK; it is added, and no variable that the user has set changes."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER", "OMPI", "PMI", "MPI", "SLURM")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    environment = kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | own
    command = [sys.executable, "-c", ENGINE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [{}, after]
