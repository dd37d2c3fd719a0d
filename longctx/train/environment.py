"""Describe the machine and software of a run: environment.json, and the versions in a checkpoint's manifest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("longctx", "torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy", "pydantic")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """Return the commit of longctx's checkout, with ``-dirty`` if files changed; None if it is not a checkout."""
    root = Path(__file__).resolve().parents[2]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None

    def ask(*arguments: str) -> str:
        command = [git, "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        commit = ask("rev-parse", "HEAD")
        return commit + "-dirty" if ask("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def environment(world: dict[str, int], commit: str | None) -> dict[str, Any]:
    """Return the contents of environment.json. Environment variables are excluded: some are secret."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "versions": versions(),
        "git_commit": commit,
        "arguments": sys.argv,
        "host": platform.node(),
        "system": platform.platform(),
        "device": device,
        "gpus_here": torch.cuda.device_count(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads_per_rank": torch.get_num_threads(),
        "world": world,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
