"""Run a multi-host job from configuration to exit code, or work out what would run without running it."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import secrets
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from longctx import slurm
from longctx.config.derived import Derived, derive
from longctx.config.hosts import bare
from longctx.config.schema import RunConfig
from longctx.config.sections.stage import StageSection
from longctx.config.stages import stages_of
from longctx.config.write import dump
from longctx.errors import LaunchError
from longctx.launch import hardware
from longctx.launch.cluster import control, jobspec
from longctx.launch.cluster.commands import Command, commands, require_tools
from longctx.launch.cluster.hosts import hosts_of, with_slots
from longctx.launch.cluster.placement import Placement, place_ranks
from longctx.launch.cluster.supervise import JobOutcome, Supervisor
from longctx.launch.environment import travelling
from longctx.network import address_of, address_towards
from longctx.train.folder import require_usable
from longctx.train.lock import FolderLock, require_free


class ClusterJob(NamedTuple):
    """A multi-host job before it starts: placement, commands, environment and paths."""

    config: RunConfig
    placement: Placement
    commands: list[Command]
    environment: dict[str, str]
    """variables sent to every rank"""
    spec_path: Path
    folder: str
    python: str


def plan_job(config: RunConfig, sizes: Derived) -> ClusterJob:
    """Return placement, commands and environment of a job; nothing is run or written.

    Raises:
        LaunchError: the mesh does not fit the hosts, or the hosts are unknown.
    """
    hosts = with_slots(hosts_of(config.launch), config.launch, sizes.world)
    return _job(config, hosts, (sizes.ring, sizes.ulysses, sizes.data))


def _job(config: RunConfig, hosts: Sequence[tuple[str, int]], grid: tuple[int, int, int]) -> ClusterJob:
    launch, placement = config.launch, place_ranks(hosts, *grid)
    python, folder = launch.python or sys.executable, launch.folder or os.getcwd()
    path = Path(folder, config.output.folder).absolute() / jobspec.FOLDER / jobspec.NAME
    found = commands(launch, placement.hosts, python, hardware.python_path(), str(path))
    return ClusterJob(config, placement, found, travelling(os.environ, launch.environment), path, folder, python)


def train(config: RunConfig, sizes: Derived, *, only_check: bool = False) -> int:
    """Run the job and return its exit code, as ``local.train`` does; restart it up to `launch.restarts` times.

    Args:
        only_check: check that every host is ready; start no ranks.

    Raises:
        LaunchError: the job cannot be started from this machine.
    """
    job = plan_job(config, sizes)
    require_tools(config.launch)
    if not only_check:
        require_usable(job.spec_path.parent.parent)
        require_free(job.spec_path.parent.parent)
    private = job.spec_path.parent
    jobspec.make_private(private)
    with FolderLock(private):
        outcome = _attempt(job, only_check)
        for left in range(config.launch.restarts - 1, -1, -1):
            if not outcome.again:
                break
            print(f"longctx: restarting from the newest checkpoint ({left} restarts left)", file=sys.stderr)
            time.sleep(1)
            outcome = _attempt(job, only_check)
            fewer = without(job, sizes, outcome.absent)
            if fewer is not None:  # a failed host is still down: continue with the others
                job = fewer
                outcome = _attempt(job, only_check)
    return outcome.code


def without(job: ClusterJob, sizes: Derived, absent: frozenset[str]) -> ClusterJob | None:
    """Return the job on the remaining hosts: fewer data-parallel replicas, the same global batch.

    None if no host is absent, or the remaining hosts cannot hold one replica.
    """
    left = [(name, count) for name, count in job.placement.hosts if name not in absent]
    room = sum(count for _, count in left)
    of_one, batch, micro = sizes.ring * sizes.ulysses, sizes.global_batch, sizes.micro_batch
    train, stages = job.config.train, _with_batches(job.config, sizes.world)
    batches = [(batch, micro), *((stage.global_batch or batch, stage.micro_batch or micro) for stage in stages)]
    whole = (d for d in range(room // of_one, 0, -1) if all(rows % (once * d) == 0 for rows, once in batches))
    data = next(whole, 0)
    if not absent or data == 0:
        return None
    names = ", ".join(sorted(absent))
    print(f"longctx: continuing without {names}: mesh.data is now {data}", file=sys.stderr, flush=True)
    changes = {
        "mesh": job.config.mesh.model_copy(
            update={"ring": sizes.ring, "ulysses": sizes.ulysses, "data": data, "world": "auto"}
        ),
        "train": train.model_copy(update={"global_batch": batch, "stages": stages}),
    }
    return _job(job.config.model_copy(update=changes), left, (sizes.ring, sizes.ulysses, data))


def _with_batches(config: RunConfig, world: int) -> tuple[StageSection, ...]:
    """Return the stages of a run with their global batches written out, so that fewer replicas do not change them."""
    given = config.train.stages
    rows = [derive(stage.config, world).global_batch for stage in stages_of(config)] if given else []
    return tuple(stage.model_copy(update={"global_batch": one}) for stage, one in zip(given, rows, strict=True))


def _attempt(job: ClusterJob, only_check: bool) -> JobOutcome:
    text = dump(job.config)
    config = job.spec_path.with_name(jobspec.CONFIG)
    jobspec.write_private(config, text)
    try:
        with control.listen(_address(job)) as listener:
            _announce(*listener.getsockname()[:2])
            given = _spec(job, listener.getsockname(), text)
            jobspec.save(given, job.spec_path)
            supervisor = Supervisor(given, listener, job.config.launch.start_seconds)
            return supervisor.check(job.commands) if only_check else supervisor.run(job.commands)
    except OSError as error:
        raise LaunchError(f"the launcher cannot listen for its agents: {error}; set launch.interface") from None
    finally:
        job.spec_path.unlink(missing_ok=True)


def _announce(address: str, port: int) -> None:
    """Print where the launcher listens, with a warning on a public address: traffic between ranks is unencrypted."""
    print(f"longctx: hosts connect to {address} port {port}", file=sys.stderr, flush=True)
    if ipaddress.ip_address(address).is_global:
        print(
            f"longctx: warning: {address} is a public address, and traffic between ranks is not encrypted; name a "
            "private network's interface in launch.interface",
            file=sys.stderr,
        )


def _address(job: ClusterJob) -> str:
    """Return the address of this machine that the agents connect to."""
    wanted = job.config.launch.interface
    if wanted != "auto":
        found = address_of(wanted)
        if found is not None:
            return found
    for name, _ in reversed(job.placement.hosts):  # the last host is most likely not this one
        try:
            return address_towards(slurm.address(name) if job.config.launch.launcher == "slurm" else bare(name))
        except OSError:
            continue
    names = ", ".join(name for name, _ in job.placement.hosts[:8])
    raise LaunchError(f"this machine can resolve none of the hosts ({names}); write names that it can resolve")


def _spec(job: ClusterJob, listening: Sequence[object], text: str) -> jobspec.JobSpec:
    launch = job.config.launch
    config = str(job.spec_path.with_name(jobspec.CONFIG))
    return jobspec.JobSpec(
        address=str(listening[0]),
        port=int(str(listening[1])),
        token=secrets.token_hex(16),
        hosts=job.placement.hosts,
        folder=job.folder,
        output=str(job.spec_path.parent.parent),
        config=config,
        config_sha256=hashlib.sha256(text.encode()).hexdigest(),
        environment=job.environment,
        interface=launch.interface,
        python=job.python,
        python_path=hardware.python_path(),
        silence_seconds=launch.silence_seconds,
        columns=shutil.get_terminal_size().columns if sys.stdout.isatty() else 0,
        command=(job.python, "-m", "longctx.launch.rank", "--config", config),
    )
