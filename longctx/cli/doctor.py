"""`longctx doctor`: is this machine ready? Every check names what it saw and, where it fails, what to do.

Nothing is imported that could hang or compile; versions come from package metadata.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from longctx.errors import LongctxError
from longctx.launch import hardware, prepare
from longctx.world import launched_world

OK, WARN, FAIL = "ok", "warn", "fail"
_GIB = 2**30


class Check(NamedTuple):
    """One line of the report."""

    name: str
    status: str
    """ok, warn (works, but), or fail (training cannot start)"""
    seen: str
    fix: str = ""


# package -> (lowest version that longctx accepts, as in pyproject.toml, first version nobody has tried)
_TESTED = {
    "torch": ("2.10", "2.14"),
    "transformers": ("5.17", "5.24"),
    "deepspeed": ("0.18", "0.20"),
    "pydantic": ("2.7", "3"),
    "pyyaml": ("6.0", "7"),
    "safetensors": ("0.5", "1"),
    "tokenizers": ("0.21", "1"),
    "numpy": ("1.26", "3"),
}
_OPTIONAL = {"matplotlib": "loss.png (longctx[plot])", "tensorboard": "TensorBoard (longctx[tensorboard])"}


def examine() -> list[Check]:
    """Run every check, in seconds; a check that breaks is a failure of its own, never a traceback."""
    results: list[Check] = []
    for check in _CHECKS:
        try:
            results += check()
        except (OSError, LongctxError) as error:
            results.append(Check(check.__name__.strip("_"), FAIL, str(error)))
    return results


def _python() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    fine = sys.version_info >= (3, 11)
    yield Check(
        "python", OK if fine else FAIL, f"{version} at {sys.executable}", "" if fine else "use Python 3.11 or newer"
    )


def _packages() -> Iterator[Check]:
    for name, (low, high) in _TESTED.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name, FAIL, "not installed", f"pip install '{name}>={low}'")
            continue
        if _number(version) < _number(low):
            yield Check(name, FAIL, version, f"older than {low}, which has security fixes: pip install -U {name}")
        elif _number(version) >= _number(high):
            yield Check(name, WARN, version, f"newer than what was tested (below {high})")
        else:
            yield Check(name, OK, version)
    for name, purpose in _OPTIONAL.items():
        try:
            yield Check(name, OK, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Check(name, WARN, "not installed", f"only needed for {purpose}")


def _number(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def _toolchain() -> Iterator[Check]:
    """On the CPU, DeepSpeed compiles an extension once; on GPUs nothing is compiled."""
    needed = FAIL if hardware.gpus() == 0 else WARN
    try:
        prepare.require_toolchain()
        yield Check("compiler", OK, f"{shutil.which(os.environ.get('CXX', 'c++'))} and Python's headers")
    except LongctxError as error:
        yield Check("compiler", needed, *_halves(error))
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    fix = "" if ninja else "pip install ninja"
    yield Check("ninja", OK if ninja else needed, ninja or "not on PATH", fix)


def _extension_locks() -> Iterator[Check]:
    stale = []
    for folder in prepare.build_folders():
        for lock in sorted(folder.glob("*/lock")):
            try:
                prepare.require_live(lock)
            except LongctxError:
                stale.append(str(lock))
    if stale:
        fix = "left by a killed compilation; every start would wait for ever: rm " + " ".join(stale)
        yield Check("extension locks", FAIL, f"{len(stale)} stale", fix)
    else:
        yield Check("extension locks", OK, "none left behind")


def _accelerators() -> Iterator[Check]:
    count = hardware.gpus()
    yield Check("devices", OK, f"{count} GPU(s)" if count else f"no GPU in use; {hardware.cores()} CPU cores, gloo")


def _disk() -> Iterator[Check]:
    free = shutil.disk_usage(".").free
    yield Check(
        "disk",
        OK if free > 5 * _GIB else WARN,
        f"{free / _GIB:.1f} GiB free here",
        "" if free > 5 * _GIB else "free some space",
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        fine = size >= _GIB // 2
        fix = "" if fine else "NCCL and gloo need 512 MB: docker run --shm-size=1g"
        yield Check("/dev/shm", OK if fine else WARN, f"{size / _GIB:.2f} GiB", fix)


def _network() -> Iterator[Check]:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
            yield Check("local port", OK, f"127.0.0.1:{probe.getsockname()[1]} can be bound")
        except OSError as error:
            yield Check(
                "local port", FAIL, f"127.0.0.1 cannot be bound: {error.strerror}", "bring the loopback interface up"
            )


def _launchers() -> Iterator[Check]:
    """What can start ranks on other hosts; `longctx launch CONFIG --check` then asks the hosts themselves."""
    tools = {"deepspeed": "ssh", "openmpi": "mpirun", "mpich": "mpiexec.hydra", "slurm": "srun"}
    here = [f"{name} ({tool})" for name, tool in tools.items() if shutil.which(tool)]
    yield Check("launchers", OK, f"local{''.join(f', {name}' for name in here)}")
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "no address"
    alone = address.startswith(("127.", "no "))
    more = ": no other host gets here by that name, so ranks use the interface towards each other" if alone else ""
    yield Check("host name", OK, f"{socket.gethostname()} is {address}{more}")


def _limits() -> Iterator[Check]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    fine = files == resource.RLIM_INFINITY or files >= 1024
    yield Check("open files", OK if fine else WARN, str(files), "" if fine else "ulimit -n 4096")


def _environment() -> Iterator[Check]:
    world, rank = launched_world()
    if world is None:
        yield Check("shell", OK, "this shell is not inside a launched job")
    else:
        fix = "longctx train starts its own ranks: unset WORLD_SIZE and RANK, or run launch/train.py here"
        yield Check("shell", WARN, f"rank {rank} of {world} in the environment", fix)


def _halves(error: Exception) -> tuple[str, str]:
    seen, _, fix = str(error).partition("; ")
    return seen, fix


_CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    _python,
    _packages,
    _toolchain,
    _extension_locks,
    _accelerators,
    _disk,
    _network,
    _launchers,
    _limits,
    _environment,
)
