"""`longctx launch CONFIG --print`: describe commands, environment and placement. Nothing is run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from longctx.config.derived import Derived
from longctx.config.schema import RunConfig
from longctx.launch import hardware
from longctx.launch.cluster.placement import place_ranks, table
from longctx.launch.cluster.run import ClusterJob, plan_job


def show(config: RunConfig, sizes: Derived, path: Path, overrides: Sequence[str]) -> str:
    """Return, as text, what `longctx train` would do with a configuration."""
    if config.launch.launcher == "local":
        return _local(sizes, path, overrides)
    job = plan_job(config, sizes)
    lines = [f"launcher {config.launch.launcher}: {sizes.world} ranks on {len(job.placement.hosts)} hosts", ""]
    lines += ["placement", *table(job.placement), "", *_environment(job), "", "commands"]
    lines += [f"  {shlex.join(command.argv)}" for command in job.commands]
    return "\n".join(lines)


def _local(sizes: Derived, path: Path, overrides: Sequence[str]) -> str:
    here = place_ranks([("this machine", sizes.world)], sizes.ring, sizes.ulysses, sizes.data)
    command = [sys.executable, "-m", "longctx.launch.rank", "--config", str(path), *overrides]
    lines = [f"launcher local: {sizes.world} ranks on this machine", "", "placement", *table(here), ""]
    lines += ["environment: this shell's, and GLOO_, NCCL_ and TP_SOCKET_IFNAME=lo", ""]
    return "\n".join([*lines, f"command of each of the {sizes.world} ranks", f"  {shlex.join(command)}"])


def _environment(job: ClusterJob) -> list[str]:
    """List the variables sent to the hosts. Values are not shown: some may be secrets."""
    threads = hardware.threads_per_rank(max(count for _, count in job.placement.hosts))
    interface = job.config.launch.interface
    which = "each host's interface that reaches the launcher" if interface == "auto" else interface
    lines = [f"environment sent to every host, in {job.spec_path} (mode 0600, removed at the end)"]
    lines += [f"  {name} ({len(value)} characters)" for name, value in job.environment.items()] or ["  nothing"]
    lines += ["set on every host", f"  GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, TP_SOCKET_IFNAME: {which}"]
    lines += ["  RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT: from the placement above"]
    lines.append(f"  OMP_NUM_THREADS: the host's cores / its ranks (here {threads})")
    return [*lines, f"working directory {job.folder}"]
