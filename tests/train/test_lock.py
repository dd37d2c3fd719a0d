"""The lock of a run directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from longctx.errors import CheckpointError
from longctx.train.lock import FolderLock


def test_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    hold = (
        "import sys, pathlib; from longctx.train.lock import FolderLock\n"
        "with FolderLock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match=f"process {holder.pid} on "), FolderLock(tmp_path):
            pass
        holder.kill()
        holder.wait()
    with FolderLock(tmp_path):
        pass
