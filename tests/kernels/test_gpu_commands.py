"""The documented commands for a machine with a GPU start where DeepSpeed is missing and nothing can be installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from house_files import ROOT

# Runs `python -m MODULE ARGUMENTS...` where importing one of these fails, as on a machine that lacks them.
LACKING = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "pydantic", "hjson", "yaml", "liger_kernel", "fla"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def start(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", LACKING, *arguments],
        cwd=ROOT, env={**environment, **more}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_gpu_tests_start() -> None:
    """They are found, nothing is compiled first, and the only thing that they miss is a GPU."""
    one = "test_the_same_every_time"
    done = start("pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-k", one, TRITON_INTERPRET="0")
    assert "AssertionError: -m gpu is for machines with one" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ deselected, 1 error in", done.stdout.splitlines()[-1])


@pytest.mark.deep
def test_the_gpu_benchmark_starts() -> None:
    done = start("benchmarks.gpu.run")
    assert done.returncode == 2 and "no GPU here" in done.stdout, done.stderr[-2000:]


def test_the_documents_name_commands_that_install_nothing() -> None:
    for name in ("docs/kernels.md", "benchmarks/README.md"):
        assert "python3 -m benchmarks.gpu.run" in (ROOT / name).read_text(), name
    target = re.search(r"^bench-gpu:(.*?)##.*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert target is not None and not target[1].strip() and "benchmarks.gpu.run" in target[2]
