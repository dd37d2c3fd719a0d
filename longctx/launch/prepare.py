"""Compile DeepSpeed's CPU communication extension before ranks start, or report what is missing.

DeepSpeed compiles ``deepspeed_shm_comm`` at its first start on a CPU, while the other ranks wait. Here one process
compiles it before any rank starts (``engine.cpu_extension`` loads it in the ranks).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time

from longctx.engine.cpu_extension import (
    BUILD_SECONDS,
    EXTENSION,
    build_folders,
    clear_stale,
    load_extension,
    locks,
    require_live,
    require_ninja,
    require_toolchain,
    require_writable,
    root,
)
from longctx.errors import LaunchError, MissingPackageError
from longctx.launch.hardware import python_path

_SAY_EVERY = 15.0


def prepare() -> None:
    """Compile the extension in a child process unless it is compiled already.

    Raises:
        MissingPackageError: deepspeed, a C++ compiler or Python's headers are missing.
        LaunchError: a stale lock, a folder that cannot be written, or a failed build.
    """
    clear_stale_locks()
    if not ready():
        require_writable(root())
        _build()


def ready() -> bool:
    """Return whether the extension is compiled already; nothing is changed.

    Raises:
        MissingPackageError, LaunchError: as ``prepare``, where it can be detected without compiling.
    """
    if not _importable("deepspeed"):
        raise MissingPackageError("deepspeed is not installed here; install longctx with its dependencies")
    require_ninja()
    for lock in locks("*"):
        require_live(lock)
    if any((folder / EXTENSION / f"{EXTENSION}.so").is_file() for folder in build_folders()):
        return True
    require_toolchain()
    return False


def clear_stale_locks() -> None:
    """Remove extension locks that are certainly stale.

    Raises:
        LaunchError: a lock has no holder on this machine, but a process elsewhere may hold it.
    """
    for lock in locks("*"):
        clear_stale(lock)


def _build() -> None:
    """Compile in a child process; remove its lock if the build fails or is interrupted."""
    child = subprocess.Popen(
        [sys.executable, "-m", "longctx.launch.prepare"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": python_path()},
        start_new_session=True,
    )
    try:
        output = _wait(child)
    except BaseException as error:
        os.killpg(child.pid, 9)
        child.wait()
        for lock in locks(EXTENSION):
            clear_stale(lock)
        if isinstance(error, subprocess.TimeoutExpired):
            raise LaunchError(f"compiling {EXTENSION} took more than {BUILD_SECONDS} s and was stopped") from None
        raise
    if child.returncode != 0:
        tail = "\n".join(output.splitlines()[-20:])
        raise LaunchError(f"DeepSpeed's {EXTENSION} does not compile here; the last lines of the build:\n{tail}")


def _wait(child: subprocess.Popen[str]) -> str:
    """Wait for a build, printing progress every 15 s; return its output. Raises: subprocess.TimeoutExpired."""
    started = time.monotonic()
    _say(f"compiling DeepSpeed's {EXTENSION}, once for this machine; this takes a minute or two")
    while True:
        left = BUILD_SECONDS - (time.monotonic() - started)
        try:
            return child.communicate(timeout=min(left, _SAY_EVERY))[0]
        except subprocess.TimeoutExpired:
            if left <= _SAY_EVERY:
                raise
            _say(f"still compiling {EXTENSION}, {time.monotonic() - started:.0f} s so far")


def _say(text: str) -> None:
    print(f"longctx: {text}", file=sys.stderr, flush=True)


def _importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


if __name__ == "__main__":
    load_extension()
