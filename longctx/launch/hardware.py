"""Count this machine's CPU cores and the GPUs that the installed torch can use, without importing torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from longctx.errors import LaunchError


def cores() -> int:
    """Return the CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_rank(local_ranks: int) -> int:
    """Return the number of threads per process: an equal share of the cores, at least one."""
    return max(cores() // local_ranks, 1)


def python_path() -> str:
    """Return PYTHONPATH for child processes; if longctx runs from a checkout, the checkout comes first."""
    root = Path(__file__).resolve().parents[2]
    given = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(filter(None, [str(root), given])) if (root / "pyproject.toml").is_file() else given


def gpus() -> int:
    """Return the number of GPUs to use: 0 where DS_ACCELERATOR=cpu or torch was built without CUDA or ROCm."""
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda" or not _torch_knows_gpus():
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return _nvidia_gpus() or _amd_gpus()


def require_dtype(dtype: str) -> None:
    """Reject `model.dtype: fp16` on hardware without fp16 arithmetic, before any rank starts.

    Raises:
        LaunchError: there is no GPU, and the CPU has no fp16 instructions.
    """
    if dtype == "fp16" and not gpus() and "avx512_fp16" not in _cpu_flags():
        raise LaunchError(
            "model.dtype: fp16, but this machine has no GPU and its CPU has no fp16 instructions; use bf16 or fp32"
        )


def _cpu_flags() -> list[str]:
    """Return the instruction sets that Linux lists for the first core; empty if it lists none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.split() for line in lines if line.startswith("flags")), [])


def default_world() -> int:
    """Return the default number of ranks: one per GPU, else two CPU processes."""
    return gpus() or 2


def gpu_bytes() -> int | None:
    """Return the memory of the smallest NVIDIA GPU that may be used, in bytes; None if there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None or not gpus():
        return None
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return min((int(line) * 2**20 for line in listing.stdout.split() if line.isdecimal()), default=None)


def _torch_knows_gpus() -> bool:
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    text = version.read_text() if version and version.is_file() else ""
    return bool(re.search(r"^(cuda|hip)\b.*= *'", text, re.MULTILINE))


def _nvidia_gpus() -> int:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(re.findall(r"^GPU \d+:", listing.stdout, re.MULTILINE))


def _amd_gpus() -> int:
    nodes = Path("/sys/class/kfd/kfd/topology/nodes")
    simd = [path.read_text() for path in nodes.glob("*/properties")] if nodes.is_dir() else []
    return sum(1 for text in simd if re.search(r"^simd_count [1-9]", text, re.MULTILINE))
