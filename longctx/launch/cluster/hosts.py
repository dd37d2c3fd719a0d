"""The hosts of a job: from the YAML, a hostfile, or the scheduler that gave us an allocation."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from longctx import slurm
from longctx.config.hosts import Host, once_each, parse_host, parse_hostfile, require_users
from longctx.config.schema import RunConfig
from longctx.config.sections.launch import LaunchSection
from longctx.errors import LaunchError
from longctx.launch import hardware


def hosts_of(launch: LaunchSection) -> tuple[Host, ...]:
    """Return the hosts that ``launch`` names; inside a SLURM allocation that names none, the allocation's.

    Raises:
        LaunchError: a hostfile cannot be read or is not one; SLURM does not say which hosts it gave.
    """
    if launch.hostfile is not None:
        try:
            hosts = parse_hostfile(Path(launch.hostfile).read_text(encoding="utf-8"))
            require_users(hosts, launch.launcher)
            return hosts
        except (OSError, UnicodeDecodeError) as error:
            raise LaunchError(f"launch.hostfile {launch.hostfile!r} cannot be read: {error}") from None
        except LaunchError as error:
            raise LaunchError(f"launch.hostfile {launch.hostfile!r}, {error}") from None
    if launch.hosts:
        return once_each([parse_host(text) for text in launch.hosts])
    return _allocation()


def with_slots(hosts: tuple[Host, ...], launch: LaunchSection, world: int) -> tuple[tuple[str, int], ...]:
    """Return (name, ranks) of every host: what it says itself, else `ranks_per_host`, else a share of ``world``."""
    share = -(-world // len(hosts))
    common = launch.ranks_per_host if isinstance(launch.ranks_per_host, int) else hardware.gpus() or share
    return tuple((host.name, host.slots or common) for host in hosts)


def default_world(config: RunConfig) -> int:
    """Return how many ranks a run has where neither its mesh nor a launcher says: what its hosts take, else what this
    machine does. Names that are none are reported elsewhere."""
    launch, here = config.launch, hardware.default_world()
    if launch.launcher == "local":
        return here
    common = launch.ranks_per_host if isinstance(launch.ranks_per_host, int) else hardware.gpus() or None
    try:
        counts = [host.slots or common for host in hosts_of(launch)]
    except LaunchError:
        return here
    return here if None in counts else sum(count for count in counts if count)


def _allocation() -> tuple[Host, ...]:
    listed = os.environ.get("SLURM_JOB_NODELIST")
    if not listed or shutil.which("scontrol") is None:
        raise LaunchError(
            "no host is named and this is not inside a SLURM allocation: run it under salloc or sbatch, or write "
            "launch.hosts"
        )
    try:
        names = slurm.nodes(listed)
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(f"scontrol does not say which hosts {listed[:80]!r} are: {error}") from None
    return once_each([parse_host(name) for name in names])
