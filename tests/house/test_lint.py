"""ruff and mypy find nothing, so that one command checks the whole tree."""

from __future__ import annotations

import subprocess
import sys

import pytest
from house_files import ROOT


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=["ruff", "format", "mypy"]
)
def test_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
