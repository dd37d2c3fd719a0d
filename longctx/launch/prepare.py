"""Get DeepSpeed's CPU communication extension ready before ranks start, or say what is missing.

DeepSpeed compiles ``deepspeed_shm_comm`` at its first start on a CPU. Ranks that do so at once wait for each other on
a lock file without an owner: a build that was killed leaves it, and every later start then waits for ever without a
word. So one process builds, before any rank; ranks load it one by one under a lock that ends with its holder; and a
lock file of torch's that nobody holds is reported.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from longctx.errors import LaunchError, MissingPackageError
from longctx.launch.hardware import python_path

EXTENSION = "deepspeed_shm_comm"
BUILD_SECONDS = 900  # some 100 s of one quiet core; ranks have not started yet
_SAY_EVERY = 15.0


def prepare() -> None:
    """Make sure that ranks on the CPU can start DeepSpeed; compile the extension, in a process of its own, if need be.

    Raises:
        MissingPackageError: deepspeed, a C++ compiler or Python's headers are missing.
        LaunchError: a stale lock, a folder that cannot be written, or a failed build.
    """
    if not ready():
        _require_writable(_root())
        _build()


def ready() -> bool:
    """Say whether the extension is compiled already; nothing is changed.

    Raises:
        MissingPackageError, LaunchError: as ``prepare``, for what can be seen without compiling.
    """
    if not _importable("deepspeed"):
        raise MissingPackageError("deepspeed is not installed here; install longctx with its dependencies")
    require_ninja()
    for lock in _locks("*"):
        require_live(lock)
    if any((folder / EXTENSION / f"{EXTENSION}.so").is_file() for folder in build_folders()):
        return True
    require_toolchain()
    return False


def load_extension() -> None:
    """Load the extension into this process, so that DeepSpeed need not; compile it first if it is not there.

    Raises:
        MissingPackageError, LaunchError: as ``prepare``; or another build took too long.
    """
    require_ninja()
    _require_writable(_root())
    with (_root() / ".longctx.lock").open("a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        deadline = time.monotonic() + BUILD_SECONDS
        while locks := _locks(EXTENSION):  # not one of ours: those wait for the lock above
            require_live(locks[0])
            if time.monotonic() > deadline:
                raise LaunchError(f"another process has been compiling under {locks[0]} for {BUILD_SECONDS} s")
            time.sleep(0.2)
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        try:
            ShareMemCommBuilder().load(verbose=False)
        except (RuntimeError, OSError) as error:
            require_toolchain()
            raise LaunchError(f"DeepSpeed's {EXTENSION} does not compile or load here: {error}") from None


def build_folders() -> list[Path]:
    """Return the folders in which torch keeps what this Python compiled, one folder an extension."""
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return [_root()]
    version = f"py{sys.version_info[0]}{sys.version_info[1]}"
    return sorted(folder for folder in _root().glob(f"{version}*_*") if folder.is_dir())


def _locks(extension: str) -> list[Path]:
    return sorted(lock for folder in build_folders() for lock in folder.glob(f"{extension}/lock"))


def _root() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or f"{cache}/torch_extensions")


def require_live(lock: Path) -> None:
    """Raise LaunchError if no process on this machine holds the lock file of a build open."""
    for _ in range(2):  # twice: torch closes a lock shortly before it deletes it
        if not lock.exists() or _held(lock):
            return
        time.sleep(0.3)
    raise LaunchError(
        f"{lock} was left by a compilation that was killed; every start of DeepSpeed would wait for it for ever. "
        f"If no other machine is compiling there, delete it: rm {lock}"
    )


def require_ninja() -> None:
    """Put this environment's ninja first on PATH, or raise MissingPackageError if there is none at all.

    Always the same one: two versions of ninja do not read each other's logs, so that starts from an activated and from
    another shell would compile everything again each time.
    """
    beside = str(Path(sys.executable).parent)
    given = os.environ.get("PATH", "")
    if shutil.which("ninja", path=beside) and given.split(os.pathsep)[0] != beside:
        os.environ["PATH"] = f"{beside}{os.pathsep}{given}"
    if shutil.which("ninja") is None:
        raise MissingPackageError("ninja is not on PATH, and DeepSpeed compiles with it: pip install ninja")


def require_toolchain() -> None:
    """Raise MissingPackageError unless a C++ compiler and Python's headers are there."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise MissingPackageError(
            f"no C++ compiler ({compiler!r} is not on PATH): DeepSpeed compiles a small extension on its first CPU "
            "start; install one (Debian, Ubuntu: apt install g++) or set CXX"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise MissingPackageError(
            f"Python's headers are missing ({header}): DeepSpeed compiles a small extension on its first CPU start; "
            f"install them (Debian, Ubuntu: apt install python{sys.version_info[0]}.{sys.version_info[1]}-dev)"
        )


def _held(lock: Path) -> bool:
    """Say whether a process on this machine has the file open, as torch has while it compiles."""
    try:
        wanted = lock.stat()
    except OSError:
        return True  # deleted a moment ago
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found = link.stat()
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


def _require_writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise PermissionError
    except OSError:
        raise LaunchError(
            f"{root} cannot be written, and torch puts compiled extensions there; set TORCH_EXTENSIONS_DIR to a folder "
            "that can"
        ) from None


def _build() -> None:
    """Compile in a child process; a build that fails or is interrupted leaves no lock behind."""
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
        for lock in _locks(EXTENSION):
            lock.unlink(missing_ok=True)
        if isinstance(error, subprocess.TimeoutExpired):
            raise LaunchError(f"compiling {EXTENSION} took more than {BUILD_SECONDS} s and was stopped") from None
        raise
    if child.returncode != 0:
        tail = "\n".join(output.splitlines()[-20:])
        raise LaunchError(f"DeepSpeed's {EXTENSION} does not compile here; the end of the build's output:\n{tail}")


def _wait(child: subprocess.Popen[str]) -> str:
    """Wait for a build, saying now and then that it goes on; return its output. Raises: subprocess.TimeoutExpired."""
    started = time.monotonic()
    _say(f"compiling DeepSpeed's {EXTENSION}, once for this machine; it takes a minute or two")
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
