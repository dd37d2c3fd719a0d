"""What an agent says about its host before anything is trained, and what is wrong with it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from longctx.errors import LongctxError
from longctx.launch import hardware, prepare
from longctx.launch.cluster.jobspec import JobSpec, hash_of

MOST_SKEW = 30.0  # seconds: more, and logs, locks and checkpoints of several hosts tell no story
LEAST_DISK = 2**30
_PACKAGES = ("longctx", "torch", "deepspeed", "transformers")


def own_versions() -> dict[str, str]:
    """Return the versions that must be the same on every host."""
    found = {"python": ".".join(map(str, sys.version_info[:2]))}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def gather(spec: JobSpec) -> dict[str, Any]:
    """Look at this host, in well under a second."""
    output = Path(spec.output)
    try:
        disk = shutil.disk_usage(output).free
    except OSError:
        disk = 0
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "clock": time.time(),
        "versions": own_versions(),
        "config": hash_of(Path(spec.config)),
        "gpus": hardware.gpus(),
        "disk": disk,
        "writable": os.access(output, os.W_OK | os.X_OK),
        "folder": os.path.isdir(spec.folder),
        "toolchain": _toolchain(),
    }


def _toolchain() -> str:
    """Return why DeepSpeed's CPU extension could not be loaded here; empty if nothing speaks against it."""
    if hardware.gpus() > 0:
        return ""
    try:
        prepare.clear_stale_locks()
        prepare.ready()
    except LongctxError as error:
        return str(error)
    return ""


def wrong(facts: dict[str, Any], spec: JobSpec, ranks: int, gpus: int, now: float) -> list[str]:
    """Return what is wrong with a host.

    Args:
        facts: what its agent found.
        spec: what it must be good for.
        ranks: how many ranks it is to take.
        gpus: GPUs of the launcher's host; hosts must be of one kind.
        now: the launcher's clock when the facts came.
    """
    found = []
    for name, version in own_versions().items():
        there = facts["versions"].get(name)
        if there != version:
            found.append(f"{name} is {there} there and {version} here; install the same on every host")
    skew = facts["clock"] - now
    if abs(skew) > MOST_SKEW:
        found.append(f"its clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}; start its time service")
    if facts["config"] != spec.config_sha256:
        found.append(f"it sees another {spec.config}; output.folder must be on storage that all hosts share")
    if not facts["writable"]:
        found.append(f"{spec.output} cannot be written there")
    elif facts["disk"] < LEAST_DISK:
        found.append(f"{facts['disk'] / 2**30:.1f} GiB free at {spec.output}")
    if not facts["folder"]:
        found.append(f"the working directory {spec.folder} does not exist there; set launch.folder")
    if gpus and facts["gpus"] < ranks:
        found.append(f"{facts['gpus']} GPUs for {ranks} ranks; lower its number of ranks")
    elif not gpus and facts["gpus"]:
        found.append("it has GPUs and the launcher's host has none; start there, or set DS_ACCELERATOR=cpu")
    if facts["toolchain"]:
        found.append(facts["toolchain"])
    return found
