"""How a process that joined others leaves them."""

from __future__ import annotations

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
