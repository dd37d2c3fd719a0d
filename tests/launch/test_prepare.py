"""Before ranks start: a stale lock, a missing compiler, headers or package is one clear error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longctx.engine.zero import extension
from longctx.errors import LaunchError, MissingPackageError
from longctx.launch import hardware, prepare


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of compiled extensions."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / prepare.EXTENSION
    folder.mkdir()
    return folder


def test_a_lock_nobody_holds_is_removed(extensions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (extensions / f"{prepare.EXTENSION}.so").touch()
    other = extensions.parent / "cpu_adam" / "lock"  # another extension's: a start would wait for it as well
    other.parent.mkdir()
    for lock in (extensions / "lock", other):
        lock.touch()
    with pytest.raises(LaunchError, match="rm "):
        prepare.ready()  # only looks
    prepare.prepare()
    assert not (extensions / "lock").exists() and not other.exists()
    assert capsys.readouterr().err.count("left by a compilation that was killed") == 2


def test_a_lock_that_a_build_holds_is_left_alone(extensions: Path) -> None:
    lock = os.open(extensions / "lock", os.O_CREAT | os.O_EXCL)
    (extensions / f"{prepare.EXTENSION}.so").touch()
    prepare.prepare()
    os.close(lock)


def test_the_default_folder_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = Path(_get_build_directory(prepare.EXTENSION, verbose=False))
    assert built.parent in prepare.build_folders()


def test_no_compiler(extensions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingPackageError, match=r"no C\+\+ compiler \('no-such-compiler'.*apt install"):
        prepare.prepare()


def test_no_headers(extensions: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extension.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(MissingPackageError, match=r"headers are missing.*python3\.\d+-dev"):
        prepare.prepare()


def test_no_deepspeed(extensions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingPackageError, match="deepspeed is not installed"):
        prepare.prepare()


def test_a_build_that_fails_shows_its_end_and_leaves_no_lock(
    extensions: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho the compiler is broken; exit 1\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(LaunchError, match="does not compile here"):
        prepare.prepare()
    assert not (extensions / "lock").exists()


def test_hardware_is_asked_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert hardware.gpus() == 0 and hardware.default_world() == 2
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(hardware, "_torch_knows_gpus", lambda: True)
    for visible, count in (("0,3", 2), ("", 0), ("-1", 0), ("GPU-8f,GPU-9a,GPU-01", 3)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert hardware.gpus() == count
    assert hardware.threads_per_rank(10**6) == 1


def test_a_long_build_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(prepare, "_SAY_EVERY", 0.05)
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(0.5); print('done')"], stdout=subprocess.PIPE, text=True
    )
    assert prepare._wait(child) == "done\n"
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"longctx: compiling DeepSpeed's {prepare.EXTENSION}, once for this machine")
    assert len(said) >= 3 and all("still compiling" in line for line in said[1:])
    monkeypatch.setattr(prepare, "BUILD_SECONDS", 0.2)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], stdout=subprocess.PIPE) as child:
        with pytest.raises(subprocess.TimeoutExpired):
            prepare._wait(child)
        child.kill()
