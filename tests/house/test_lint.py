"""ruff and mypy find nothing: part of the tests, so that one command says whether the tree is whole."""

from __future__ import annotations

import subprocess
import sys

import pytest
from house_files import ROOT


@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", [["ruff", "check", "."], ["mypy"]], ids=["ruff", "mypy"])
def test_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
