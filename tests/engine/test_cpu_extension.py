"""Locks of compilations: one that nobody can hold is removed, any other is left, and nobody waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_tiny import tiny_llama

from longctx.engine.zero import extension
from longctx.errors import LaunchError, LongctxError
from longctx.mesh import Mesh

from distributed import run_ranks

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / extension.EXTENSION / "lock"
    path.parent.mkdir()
    return path


def test_a_stale_lock_is_removed_and_said(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock.touch()
    extension.clear_stale(lock)
    assert not list(lock.parent.iterdir())
    assert capsys.readouterr().err == f"longctx: removed {lock}, left by a compilation that was killed\n"
    extension.clear_stale(lock)  # none there: nothing to do
    assert capsys.readouterr().err == ""


def test_a_lock_of_a_process_that_lives_is_left(lock: Path) -> None:
    holder = os.open(lock, os.O_CREAT | os.O_EXCL)
    extension.clear_stale(lock)
    assert lock.exists()
    os.close(holder)
    command = [sys.executable, "-c", "print(flush=True); input()"]  # as ninja, whose parent was killed
    with subprocess.Popen(command, cwd=lock.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None and worker.stdout.readline()
        extension.clear_stale(lock)
        assert lock.exists()
        worker.kill()
    extension.clear_stale(lock)
    assert not lock.exists()


def test_what_cannot_be_proven_is_left_with_its_remedy(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()
    assert extension._file_system(lock) in extension._LOCAL
    with monkeypatch.context() as patch:
        patch.setattr(extension, "_file_system", lambda path: "nfs4")
        with pytest.raises(LaunchError, match=f"If no other machine is compiling there, delete it: rm {lock}"):
            extension.clear_stale(lock)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 4711)  # the lock is another user's, whose processes we cannot look into
        with pytest.raises(LaunchError, match=f"rm {lock}"):
            extension.clear_stale(lock)
    assert lock.exists()


def test_a_lock_that_a_new_build_takes_meanwhile_is_given_back(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()

    def replaced(path: Path) -> bool:
        path.rename(path.with_name("old"))
        path.touch()
        os.utime(path, ns=(1, 1))
        return True

    monkeypatch.setattr(extension, "_only_ours", replaced)
    extension.clear_stale(lock)
    assert lock.exists() and lock.stat().st_mtime_ns == 1


def loads(rank: int, world: int) -> str:
    from longctx.engine import initialize as door

    def refused() -> None:
        if rank == 1:
            raise LaunchError("no compiler here")

    original, door.load_extension = door.load_extension, refused
    try:
        door.initialize(model=tiny_llama(), config=CONFIG, mesh=Mesh(ring=2))
    except LongctxError as error:
        return str(error)
    finally:
        door.load_extension = original
    return "it was not called"


def test_an_own_loop_loads_the_extension_first_and_all_ranks_hear_of_a_failure() -> None:
    answers: list[Any] = run_ranks(2, loads)
    assert all("no compiler here" in answer for answer in answers), answers
