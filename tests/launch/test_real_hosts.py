"""Training on hosts with addresses, names and sshds of their own: `make test-multinode`; see namespaces.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_samples import config, hostile, repeats_a_canary
from namespaces import PORT, Hosts, run
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
from tiny_run import losses

from longctx.launch.cluster.commands import ssh

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900)]
# OpenMPI refuses root, who alone can make namespaces
OPTIONS = {"deepspeed": "", "openmpi": ", options: [--allow-run-as-root]", "mpich": ""}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    made = Hosts(tmp_path_factory.mktemp("hosts"), 2)
    yield made
    made.close()


def yaml_for(folder: Path, hosts: Hosts, launcher: str, name: str) -> Path:
    keys = f"ssh_port: {PORT}, ssh_options: {json.dumps(hosts.ssh_options)}{OPTIONS[launcher]}"
    listed = ", ".join(hosts.addresses)
    return write(folder, name, f"launcher: {launcher}, hosts: [{listed}], silence_seconds: 20, {keys}")


@pytest.fixture(scope="module")
def local_losses(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("local")
    code, output = finish(start(write(folder, "local")))
    assert code == 0, output
    return losses(folder / "local")


@pytest.mark.parametrize("launcher", OPTIONS)
def test_the_same_losses_as_on_one_machine(
    launcher: str, hosts: Hosts, tmp_path: Path, local_losses: list[str]
) -> None:
    code, output = finish(start(yaml_for(tmp_path, hosts, launcher, "run")))
    assert code == 0, output
    assert losses(tmp_path / "run") == local_losses and len(local_losses) == 5
    assert "step 5/5" in output and not hosts.processes(0) and not hosts.processes(1)
    assert not repeats_a_canary(output + written_by(tmp_path / "run"))
    assert not (tmp_path / "run" / "launch" / "ticket.json").exists()


def test_deepspeeds_own_runner_typed_by_hand(hosts: Hosts, tmp_path: Path, local_losses: list[str]) -> None:
    """`deepspeed --hostfile hosts launch/train.py --config …`, over pdsh."""
    path = write(tmp_path, "hand")
    (tmp_path / "hosts").write_text("".join(f"{address} slots=2\n" for address in hosts.addresses))
    carried = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", "")}
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in carried.items() if value))
    options = " ".join(f"-o {option}" for option in hosts.ssh_options)
    command = ["deepspeed", "--hostfile", "hosts", "--ssh_port", str(PORT), "--no_ssh_check", "--master_addr"]
    command += [hosts.addresses[0], str(ROOT / "launch" / "train.py"), "--config", str(path)]
    code, output = finish(begin(command, tmp_path, PDSH_SSH_ARGS_APPEND=options))
    assert code == 0, output
    assert losses(tmp_path / "hand") == local_losses


def mpirun(hosts: Hosts, folder: Path, path: Path, *overrides: str) -> subprocess.Popen[str]:
    """Type `mpirun … python launch/train.py --config PATH`: mpi4py finds the meeting point."""
    options = " ".join(f"-o {option}" for option in hosts.ssh_options)
    command = ["mpirun", "--allow-run-as-root", "-n", "4", "--host", ",".join(f"{host}:2" for host in hosts.addresses)]
    command += ["--map-by", "slot", "--bind-to", "none", "--prtemca", "plm_ssh_args", f"{options} -p {PORT}"]
    for name in ("PYTHONPATH", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR"):
        command += ["-x", name]
    command += [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(path), *overrides]
    return begin(command, folder)


def test_mpirun_typed_by_hand(hosts: Hosts, tmp_path: Path, local_losses: list[str]) -> None:
    code, output = finish(mpirun(hosts, tmp_path, write(tmp_path, "run")))
    assert code == 0 and losses(tmp_path / "run") == local_losses, output
    wait_until_empty(hosts, time.monotonic())


def test_a_killed_rank_under_mpirun_by_hand(hosts: Hosts, tmp_path: Path) -> None:
    process = mpirun(hosts, tmp_path, write(tmp_path, "run"), "train.steps=100000")
    wait_for_steps(process, tmp_path / "run")
    victim = next(pid for pid in hosts.processes(1) if b"train.py" in cmdline(pid))
    since = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    code, output = finish(process, GONE_SECONDS)
    assert code not in (0, 75), output
    wait_until_empty(hosts, since)


@pytest.mark.parametrize("launcher", OPTIONS)
def test_a_killed_rank_a_dead_host_and_a_dead_launcher_leave_nothing(
    launcher: str, hosts: Hosts, tmp_path: Path
) -> None:
    argv = [sys.executable, "-c", "import time; time.sleep(900)", "deepspeed.launcher.launch", "longctx.launch.rank"]
    bystander = subprocess.Popen(["ip", "netns", "exec", hosts.names[1], *argv])
    hosts.bystanders = {bystander.pid}
    try:
        process = training(yaml_for(tmp_path, hosts, launcher, "killed"))
        assert not repeats_a_canary(command_lines())
        since = time.monotonic()
        os.kill(ranks(hosts, 1)[0], signal.SIGKILL)
        code, output = finish(process, GONE_SECONDS)
        assert code == 1 and f"on {hosts.addresses[1]} was killed by SIGKILL" in output, output
        wait_until_empty(hosts, since)

        process = training(yaml_for(tmp_path, hosts, launcher, "unplugged"))
        since = time.monotonic()
        hosts.unplug(1)
        code, output = finish(process, GONE_SECONDS)
        assert code == 1 and f"on {hosts.addresses[1]} was lost: nothing was received from it" in output, output
        wait_until_empty(hosts, since)
        hosts.plug_in(1)

        process = training(yaml_for(tmp_path, hosts, launcher, "launcher"))
        since = time.monotonic()
        process.kill()
        finish(process)
        wait_until_empty(hosts, since)
        assert bystander.poll() is None
    finally:
        hosts.plug_in(1)
        hosts.bystanders = set()
        bystander.kill()
        bystander.wait()


def test_stop_resume_and_restart(hosts: Hosts, tmp_path: Path) -> None:
    path = yaml_for(tmp_path, hosts, "deepspeed", "run")
    process = training(path)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75 and "start again to resume" in output and not hosts.processes(0)
    step = json.loads((tmp_path / "run" / "summary.json").read_text())["step"]
    goal = step + 30
    process = start(path, f"train.steps={goal}", "checkpoint.every=2", "launch.restarts=1")
    wait_for_steps(process, tmp_path / "run", step + 3)
    os.kill(ranks(hosts, 1)[0], signal.SIGKILL)
    code, output = finish(process)
    assert code == 0 and output.count("resumed at step") == 2 and "restarting from" in output, output
    assert len(losses(tmp_path / "run")) == goal


def test_a_restart_goes_on_without_the_host_that_died(hosts: Hosts, tmp_path: Path) -> None:
    path = yaml_for(tmp_path, hosts, "deepspeed", "run")
    process = start(path, "train.steps=60", "checkpoint.every=2", "launch.restarts=1")
    wait_for_steps(process, tmp_path / "run", 5)
    hosts.unplug(1)
    try:
        code, output = finish(process)
        assert code == 0 and f"continuing without {hosts.addresses[1]}: mesh.data is now 1" in output, output
        assert "was saved by 4 ranks; resharding it for 2" in output
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["world"]["data"] == 1 and summary["samples"] == 120 and len(losses(tmp_path / "run")) == 60
        wait_until_empty(hosts, time.monotonic())
    finally:
        hosts.plug_in(1)


def test_hosts_that_are_not_ready_are_named_in_one_table(hosts: Hosts, tmp_path: Path) -> None:
    path = yaml_for(tmp_path, hosts, "deepspeed", "run")
    path.write_text(path.read_text().replace(hosts.addresses[1], "10.231.77.99"))
    code, output = finish(start(path, "--check", "launch.start_seconds=40", command="launch"))
    assert code == 1 and "  10.231.77.99  its start command ended with exit code 255: " in output
    assert hosts.addresses[0] + "  " not in output and not hosts.processes(0)


def test_hostile_strings_through_a_real_sshd(hosts: Hosts, tmp_path: Path) -> None:
    listed = ", ".join(hosts.addresses)
    options = json.dumps(hosts.ssh_options)
    launch = config(f"{{launcher: deepspeed, hosts: [{listed}], ssh_port: {PORT}, ssh_options: {options}}}").launch
    words = hostile(500)
    command = ssh(hosts.addresses[0], ["env", "-C", str(tmp_path), "printf", "%s\\0", *words], launch)
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout == b"".join(os.fsencode(word) + b"\0" for word in words) and not list(tmp_path.iterdir())


def test_what_these_tests_need() -> None:
    path = f"{os.environ['PATH']}:/usr/sbin"
    tools = "ip tc ssh sshd ssh-keygen pdsh mpirun mpiexec.hydra deepspeed srun slurmd munged"
    missing = [tool for tool in tools.split() if shutil.which(tool, path=path) is None]
    assert not missing, f"`make test-multinode` installs what is missing: {missing}"
    assert os.geteuid() == 0, "network namespaces need root"
    assert run("ip", "-V")
