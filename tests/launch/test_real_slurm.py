"""Training under a real SLURM on two hosts of its own: `make test-multinode`; see slurm.py and namespaces.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from launch_samples import repeats_a_canary
from namespaces import Hosts
from real_jobs import (
    GONE_SECONDS,
    ROOT,
    begin,
    cmdline,
    command_lines,
    finish,
    ranks,
    start,
    training,
    wait_for_steps,
    wait_until_empty,
    write,
    written_by,
)
from slurm import Slurm
from tiny_run import losses

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900)]


class Cluster(NamedTuple):
    hosts: Hosts
    slurm: Slurm

    def gone(self, since: float) -> float:
        """Wait until SLURM has no job and no host has a process of one."""
        while self.slurm.steps():
            assert time.monotonic() - since < GONE_SECONDS, self.slurm.steps()
            time.sleep(0.2)
        return wait_until_empty(self.hosts, since)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    hosts = Hosts(tmp_path_factory.mktemp("hosts"), 2)
    try:
        slurm = Slurm(tmp_path_factory.mktemp("slurm"), hosts)
        yield Cluster(hosts, slurm)
        slurm.close()
    finally:
        hosts.close()


@pytest.fixture(scope="module")
def local_losses(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("local")
    code, output = finish(start(write(folder, "local")))
    assert code == 0, output
    return losses(folder / "local")


def yaml_for(folder: Path, name: str, more: str = "") -> Path:
    return write(folder, name, f"launcher: slurm, hosts: [node1, node2], silence_seconds: 20{more}")


def test_the_same_losses_as_on_one_machine(cluster: Cluster, tmp_path: Path, local_losses: list[str]) -> None:
    code, output = finish(start(yaml_for(tmp_path, "run"), **cluster.slurm.environment))
    assert code == 0 and "step 5/5" in output, output
    assert losses(tmp_path / "run") == local_losses and len(local_losses) == 5
    assert not repeats_a_canary(output + written_by(tmp_path / "run"))
    cluster.gone(time.monotonic())


def test_in_an_allocation_hosts_need_no_names(cluster: Cluster, tmp_path: Path, local_losses: list[str]) -> None:
    path = write(tmp_path, "run", "launcher: slurm")
    argv = ["salloc", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--quiet"]
    argv += [sys.executable, "-m", "longctx.cli", "train", str(path)]
    code, output = finish(begin(argv, tmp_path, **cluster.slurm.environment))
    assert code == 0 and losses(tmp_path / "run") == local_losses, output
    cluster.gone(time.monotonic())


@pytest.mark.parametrize("mpi", ["none", "pmi2"])
def test_srun_typed_by_hand(mpi: str, cluster: Cluster, tmp_path: Path, local_losses: list[str]) -> None:
    path = write(tmp_path, "run")
    argv = ["srun", f"--mpi={mpi}", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", sys.executable]
    argv += [str(ROOT / "launch" / "train.py"), "--config", str(path)]
    code, output = finish(begin(argv, tmp_path, **cluster.slurm.environment))
    assert code == 0 and losses(tmp_path / "run") == local_losses, output
    cluster.gone(time.monotonic())


def test_a_killed_rank_under_srun_by_hand(cluster: Cluster, tmp_path: Path) -> None:
    path = write(tmp_path, "run")
    argv = ["srun", "--kill-on-bad-exit=1", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", sys.executable]
    argv += [str(ROOT / "launch" / "train.py"), "--config", str(path), "train.steps=100000"]
    process = begin(argv, tmp_path, **cluster.slurm.environment)
    wait_for_steps(process, tmp_path / "run")
    victim = next(pid for pid in cluster.hosts.processes(1) if b"train.py" in cmdline(pid))
    since = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    code, output = finish(process, GONE_SECONDS)
    assert code not in (0, 75) and "Killed" in output, output
    cluster.gone(since)


def test_a_killed_rank_a_dead_host_and_a_dead_launcher_leave_nothing(cluster: Cluster, tmp_path: Path) -> None:
    process = training(yaml_for(tmp_path, "killed"), **cluster.slurm.environment)
    assert not repeats_a_canary(command_lines())
    since = time.monotonic()
    os.kill(ranks(cluster.hosts, 1)[0], signal.SIGKILL)
    code, output = finish(process, GONE_SECONDS)
    assert code == 1 and "on node2 was killed by SIGKILL" in output, output
    cluster.gone(since)

    process = training(yaml_for(tmp_path, "launcher"), **cluster.slurm.environment)
    since = time.monotonic()
    process.kill()
    finish(process)
    wait_until_empty(cluster.hosts, since)
    subprocess.run(["scancel", "--me"], env=os.environ | cluster.slurm.environment, check=True)
    cluster.gone(since)

    process = training(yaml_for(tmp_path, "unplugged"), **cluster.slurm.environment)
    since = time.monotonic()
    cluster.hosts.unplug(1)
    try:
        code, output = finish(process, GONE_SECONDS)
        assert code == 1 and "on node2 was lost: nothing was received from it" in output, output
        wait_until_empty(cluster.hosts, since)
    finally:
        cluster.hosts.plug_in(1)
    subprocess.run(["scancel", "--me"], env=os.environ | cluster.slurm.environment, check=True)


def test_a_batch_job_saves_and_queues_itself_again_and_ends_without_its_neighbour(
    cluster: Cluster, tmp_path: Path
) -> None:
    """launch/slurm.sbatch: the signal that SLURM sends before the time is over; then scancel."""
    path = write(tmp_path, "run", "launcher: slurm, options: [--overlap]")
    path.write_text(path.read_text().replace("steps: 5", "steps: 100000"))
    options = ["--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--parsable", f"--output={tmp_path}/out"]
    job = cluster.slurm.ask("sbatch", *options, str(ROOT / "launch" / "slurm.sbatch"), str(path))
    assert job.isdigit(), job
    neighbour = begin(["srun", "-n1", "--job-name=neighbour", "sleep", "600"], tmp_path, **cluster.slurm.environment)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.is_file() or metrics.read_text().count("\n") < 2:
        assert time.monotonic() < deadline and job in cluster.slurm.steps(), (tmp_path / "out").read_text()
        time.sleep(0.2)
    assert cluster.slurm.ask("scancel", "--signal=USR1", job) == ""
    while f"{job} PENDING" not in cluster.slurm.steps():
        assert time.monotonic() < deadline and job in cluster.slurm.steps(), (tmp_path / "out").read_text()
        time.sleep(0.2)
    assert "start again to resume" in (tmp_path / "out").read_text()
    assert cluster.slurm.ask("scontrol", "update", f"JobId={job}", "StartTime=now") == ""
    while (tmp_path / "out").read_text().count("resumed at step") < 1:
        assert time.monotonic() < deadline + 200 and job in cluster.slurm.steps(), (tmp_path / "out").read_text()
        time.sleep(0.2)
    since = time.monotonic()
    assert cluster.slurm.ask("scancel", job) == ""
    while job in cluster.slurm.steps() or any(b"longctx" in cmdline(pid) for pid in _alive(cluster.hosts)):
        assert time.monotonic() - since < GONE_SECONDS
        time.sleep(0.2)
    assert neighbour.poll() is None
    neighbour.terminate()
    neighbour.wait(30)
    cluster.gone(time.monotonic())


def _alive(hosts: Hosts) -> list[int]:
    return [pid for index in range(hosts.count) for pid in hosts.processes(index)]
