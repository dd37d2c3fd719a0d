"""The hosts of a job: from the YAML, a hostfile, or a SLURM allocation."""

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
    """Return the hosts that ``launch`` names, else those of the SLURM allocation.

    Raises:
        LaunchError: a hostfile cannot be read or parsed; there is no allocation, or SLURM does not list its hosts.
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
    """Return (name, ranks) of every host: its own count, else `ranks_per_host`, else an equal share of ``world``."""
    share = -(-world // len(hosts))
    common = launch.ranks_per_host if isinstance(launch.ranks_per_host, int) else hardware.gpus() or share
    return tuple((host.name, host.slots or common) for host in hosts)


def default_world(config: RunConfig) -> int:
    """Return the world size when neither the mesh nor a launcher gives one: what the hosts take, else this machine.

    Invalid host names are ignored here; starting the job reports them.
    """
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
            "no hosts are given and this shell is not inside a SLURM allocation: run under salloc or sbatch, or set "
            "launch.hosts"
        )
    try:
        names = slurm.nodes(listed)
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(f"scontrol cannot list the hosts of {listed[:80]!r}: {error}") from None
    return once_each([parse_host(name) for name in names])
