"""Load DeepSpeed's CPU communication extension, one rank at a time, and remove stale locks of killed builds.

torch's build lock is a file without an owner: a killed build leaves it behind, and every later start waits forever
without a message. Here a lock is inspected before waiting for it, and removed if no process can hold it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import sys
import sysconfig
import time
from pathlib import Path

from longctx.errors import LaunchError, MissingPackageError

EXTENSION = "deepspeed_shm_comm"
BUILD_SECONDS = 900  # a build takes about 100 s on one idle core
# Local file systems, whose files only processes of this machine create.
_LOCAL = frozenset("bcachefs btrfs ext2 ext3 ext4 f2fs jfs overlay ramfs reiserfs tmpfs xfs zfs".split())
_loaded = False


def load_extension() -> None:
    """Load the extension into this process, once, before DeepSpeed would; compile it if it is not built yet.

    Raises:
        MissingPackageError: ninja, a compiler or Python's headers are missing.
        LaunchError: the extension does not compile or load, the folder is not writable, or another build took too long.
    """
    global _loaded
    if _loaded:
        return
    require_ninja()
    require_writable(root())
    with (root() / ".longctx.lock").open("a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        deadline = time.monotonic() + BUILD_SECONDS
        while found := locks(EXTENSION):  # a build outside of longctx: our own ranks wait for the lock above
            clear_stale(found[0])
            if time.monotonic() > deadline:
                raise LaunchError(f"another process has been compiling under {found[0]} for {BUILD_SECONDS} s")
            time.sleep(0.2)
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        try:
            ShareMemCommBuilder().load(verbose=False)
        except (RuntimeError, OSError) as error:
            require_toolchain()
            raise LaunchError(f"DeepSpeed's {EXTENSION} does not compile or load here: {error}") from None
    _loaded = True


def build_folders() -> list[Path]:
    """Return the folders in which torch keeps extensions built for this Python version."""
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return [root()]
    version = f"py{sys.version_info[0]}{sys.version_info[1]}"
    return sorted(folder for folder in root().glob(f"{version}*_*") if folder.is_dir())


def locks(extension: str) -> list[Path]:
    """Return the build-lock files of an extension; ``*`` for all extensions."""
    return sorted(lock for folder in build_folders() for lock in folder.glob(f"{extension}/lock"))


def root() -> Path:
    """Return the folder below which torch keeps compiled extensions."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or f"{cache}/torch_extensions")


def require_live(lock: Path) -> None:
    """Raise LaunchError if no process on this machine has the build-lock file open. Nothing is changed."""
    if not _is_live(lock):
        raise LaunchError(
            f"{lock} was left by a compilation that was killed; every start of DeepSpeed would wait for it forever. "
            f"If no other machine is compiling there, delete it: rm {lock}"
        )


def clear_stale(lock: Path) -> None:
    """Remove a build-lock file if it is certain that no process holds it; keep that of a running build.

    It is certain if the file is owned by this user and is on a local file system, so that its holder would be one of
    our processes on this machine, and no process has it open or works in its folder.

    Raises:
        LaunchError: no process here holds it, but one of another machine or user might.
    """
    seen = _identity(lock)
    if seen is None or _is_live(lock):
        return
    if not _only_ours(lock):
        require_live(lock)
        return
    aside = lock.with_name(f".{lock.name}.{secrets.token_hex(4)}")
    try:
        lock.rename(aside)
        if _identity(aside) != seen:  # meanwhile another build started, and this is its lock: put it back
            aside.rename(lock)
            return
        aside.unlink()
    except OSError:
        return  # another process removed it
    print(f"longctx: removed {lock}, left by a compilation that was killed", file=sys.stderr, flush=True)


def _is_live(lock: Path) -> bool:
    for _ in range(2):  # twice: torch closes a lock shortly before it deletes it
        if not lock.exists() or _held(lock):
            return True
        time.sleep(0.3)
    return False


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _held(lock: Path) -> bool:
    """Return whether a process here has the file open (torch, while it builds) or works in its folder (ninja)."""
    try:
        wanted, folder = lock.stat(), lock.parent.stat()
    except OSError:
        return True  # deleted a moment ago
    for pattern, target in (("[0-9]*/fd/*", wanted), ("[0-9]*/cwd", folder)):
        for link in Path("/proc").glob(pattern):
            try:
                found = link.stat()
            except OSError:
                continue
            if (found.st_dev, found.st_ino) == (target.st_dev, target.st_ino):
                return True
    return False


def _only_ours(lock: Path) -> bool:
    """Return whether only a process of this user on this machine can have created the file."""
    try:
        mine = lock.stat().st_uid == os.geteuid()
    except OSError:
        return False
    return mine and sys.platform.startswith("linux") and _file_system(lock) in _LOCAL


def _file_system(path: Path) -> str:
    """Return the type of the file system of ``path``; empty if it is unknown."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:  # number parent major:minor root mount-point options … - type source options
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0]
    return ""


def require_ninja() -> None:
    """Put this environment's ninja first on PATH, or raise MissingPackageError if there is none at all.

    It must always be the same one: versions of ninja do not read each other's logs, so starts from an activated shell
    and from another one would recompile everything each time.
    """
    beside = str(Path(sys.executable).parent)
    given = os.environ.get("PATH", "")
    if shutil.which("ninja", path=beside) and given.split(os.pathsep)[0] != beside:
        os.environ["PATH"] = f"{beside}{os.pathsep}{given}"
    if shutil.which("ninja") is None:
        raise MissingPackageError("ninja is not on PATH, and DeepSpeed compiles with it: pip install ninja")


def require_toolchain() -> None:
    """Raise MissingPackageError unless a C++ compiler and Python's headers are installed."""
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


def require_writable(folder: Path) -> None:
    """Raise LaunchError unless ``folder`` can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError
    except OSError:
        raise LaunchError(
            f"{folder} cannot be written, and torch puts compiled extensions there; set TORCH_EXTENSIONS_DIR to a "
            "folder that can"
        ) from None
