"""Kernels compile whatever the integers of a call are: one chunk, one head, one row; and strides beyond 2^31."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernel_specialise
import pytest
from house_files import ROOT


def failing(*arguments: str) -> list[str]:
    """Variants that do not pass triton's front end, in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(kernel_specialise.__file__)), *arguments],
        cwd=ROOT, env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    *bad, count = done.stdout.splitlines() or [""]
    assert count.isdigit() and int(count) >= 30, done.stderr[-3000:]
    return bad


def test_calls_of_one_chunk_one_head_and_one_row() -> None:
    assert not failing("ones")


@pytest.mark.slow
def test_every_integer_by_itself() -> None:
    assert not failing("each")
