"""Describe what a number was measured on; part of every row."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path


@cache
def describe() -> str:
    """Return CPU model, cores, memory and versions in one line."""
    import torch

    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores, {gigabytes:.0f} GiB, "
        f"Python {platform.python_version()}, torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"
    )


def cpu_model() -> str:
    """Return the processor's name, where the system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def load() -> float:
    """Return runnable processes, averaged over a minute: wall times are valid only if it is near zero at the start."""
    return os.getloadavg()[0]


@cache
def commit() -> str:
    """Return the revision measured, with a + if the tree had changes."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"
