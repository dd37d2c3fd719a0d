"""`zero.offload_optimizer: nvme`: the folder to swap to, the space it needs, and what a machine must have."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from longctx.config.architecture import parameter_count
from longctx.config.schema import RunConfig

# DeepSpeed's builder checks libaio in the same way, but importing it takes seconds
_PROGRAM = "#include <libaio.h>\nint main(void) { return io_submit(0, 0, 0) == 0; }\n"
_BYTES = 16  # per parameter: weight, gradient and AdamW's two moments in fp32

# Elements that a rank swaps in at once. DeepSpeed's default, ten times as many, would hold most ranks' whole state in
# host memory, in four buffers.
SUB_GROUP = 100_000_000

KEY = "zero.nvme_folder"
LIBRARY = (
    "got 'nvme', but DeepSpeed needs libaio, and libaio cannot be compiled against here: apt install libaio-dev g++, "
    "or use cpu"
)


def run_folder(config: RunConfig) -> Path:
    """Return the run's own swap folder, named after its output folder, which one run at a time holds."""
    assert config.zero.nvme_folder is not None
    output = str(Path(config.output.folder).absolute())
    return Path(config.zero.nvme_folder) / f"longctx-{hashlib.sha256(output.encode()).hexdigest()[:12]}"


def missing(config: RunConfig, share: float = 1.0) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for everything that swapping to NVMe needs and this machine lacks.

    Args:
        share: fraction of the run's ranks that swap on this machine.
    """
    if config.zero.offload_optimizer != "nvme" or config.zero.nvme_folder is None:
        return
    if not has_libaio():
        yield "zero.offload_optimizer", LIBRARY
    folder = Path(config.zero.nvme_folder)
    if not folder.is_dir():
        yield KEY, f"{str(folder)!r} is not a folder here; create it on the NVMe disk of every host"
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield KEY, f"{str(folder)!r} cannot be written to; change its permissions, or give another folder"
    else:
        parameters = parameter_count(config)
        free, needed = shutil.disk_usage(folder).free, int((parameters or 0) * _BYTES * share)
        if free < needed:
            yield (
                KEY,
                f"{free / 2**30:.1f} GiB free at {str(folder)!r}, but {parameters:,} parameters need "
                f"{needed / 2**30:.1f} GiB there; free space, or give another folder",
            )


def has_libaio() -> bool:
    """Say whether a program that uses libaio compiles and links, with CFLAGS and LDFLAGS as DeepSpeed honours them."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("c++")
    if compiler is None:
        return False
    flags = (shlex.split(os.environ.get(name, "")) for name in ("CFLAGS", "LDFLAGS"))
    before, after = flags
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "aio.c"
        source.write_text(_PROGRAM)
        command = [compiler, *before, str(source), "-o", str(Path(folder) / "aio"), *after, "-laio"]
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def writes_directly(folder: Path) -> bool:
    """Say whether files in ``folder`` can be opened with O_DIRECT, as swapping does; some file systems cannot."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.close(os.open(file.name, os.O_WRONLY | getattr(os, "O_DIRECT", 0)))
        except OSError:
            return False
    return True
