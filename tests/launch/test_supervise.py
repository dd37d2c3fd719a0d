"""A job on many hosts, without hosts: agents started here, by hand, that call back as if from elsewhere.

Real hosts, with sshds and addresses of their own, are in test_real_hosts.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from launch_samples import make_spec

from longctx.launch.cluster import control, facts, jobspec
from longctx.launch.cluster.commands import Command
from longctx.launch.cluster.supervise import JobOutcome, Supervisor

SCRIPT = Path(__file__).with_name("ranks_for_tests.py")


class Job:
    """Three ranks on the hosts a and b, both of which are this machine."""

    def __init__(self, folder: Path, what: str, **changes: object) -> None:
        self.folder = folder
        jobspec.make_private(folder / "launch")
        self.path = folder / "launch" / "ticket.json"
        self.listener = control.listen("127.0.0.1")
        config = folder / "config.yaml"
        config.write_text("x")
        own = {
            "address": "127.0.0.1",
            "port": self.listener.getsockname()[1],
            "config_sha256": hashlib.sha256(b"x").hexdigest(),
            "command": (sys.executable, str(SCRIPT), what, str(folder)),
            "python_path": os.environ.get("PYTHONPATH", ""),
        }
        self.spec = make_spec(folder, **(own | changes))
        jobspec.save(self.spec, self.path)
        self.supervisor = Supervisor(self.spec, self.listener, start_seconds=60)

    def commands(self, ranks: tuple[int, ...] = (0, 1, 2)) -> list[Command]:
        """One shell-less command for every rank, in place of ssh or mpirun."""
        agent = [sys.executable, "-m", "longctx.launch.cluster.agent", str(self.path)]
        return [Command(f"r{rank}", ("env", f"RANK={rank}", "WORLD_SIZE=3", *agent)) for rank in ranks]

    def run(self, commands: list[Command] | None = None) -> JobOutcome:
        try:
            return self.supervisor.run(self.commands() if commands is None else commands)
        finally:
            self.listener.close()

    def pids(self, kind: str = "pid") -> list[int]:
        texts = [path.read_text() for path in sorted(self.folder.glob(f"{kind}-*"))]
        return [int(text) for text in texts if text]  # a rank is just writing the others

    def when_running(self, act: object) -> None:
        """Do something in a thread as soon as all ranks run."""

        def watch() -> None:
            deadline = time.monotonic() + 60
            while len(self.pids()) < 3 and time.monotonic() < deadline:
                time.sleep(0.05)
            act()  # type: ignore[operator]

        threading.Thread(target=watch, daemon=True).start()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def all_gone(job: Job, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if all(map(gone, [*job.pids(), *job.pids("child")])):
            return True
        time.sleep(0.05)
    return False


def test_every_rank_gets_its_place_and_only_what_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "stays-here")
    job = Job(tmp_path, "meet", environment={"NCCL_DEBUG": "$(x) '\"\n"})
    assert job.run() == JobOutcome(0, False)
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(3)] == ["6", "6", "6"]
    listed = Job(tmp_path, "environment", environment={"NCCL_DEBUG": "$(x) '\"\n"})
    assert listed.run().code == 0
    shown = [
        dict(line.split("=", 1) for line in (tmp_path / f"environment-{rank}").read_text().split("\0"))
        for rank in range(3)
    ]
    assert [item["LOCAL_RANK"] + item["LOCAL_WORLD_SIZE"] for item in shown] == ["02", "12", "01"]
    assert all(item["GLOO_SOCKET_IFNAME"] == item["NCCL_SOCKET_IFNAME"] == "lo" for item in shown)
    assert all(item["NCCL_DEBUG"] == "$(x) '\"\n" and "HF_TOKEN" not in item for item in shown)


def test_a_bug_is_shown_once_with_its_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(tmp_path, "raise")
    assert job.run() == JobOutcome(1, True)
    shown = capsys.readouterr().err
    assert "rank 1 on a failed" in shown and shown.count("Traceback") == 1
    assert shown.endswith("RuntimeError: a bug in rank one\n") and all_gone(job)


def test_a_users_mistake_is_one_line_and_is_not_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Job(tmp_path, "user").run() == JobOutcome(1, False)
    assert capsys.readouterr().err == "longctx: corpus.bin is truncated\n"


def test_a_killed_rank_is_named_and_what_ranks_started_dies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(tmp_path, "child")
    job.when_running(lambda: os.kill(job.pids()[2], signal.SIGKILL))
    started = time.monotonic()
    assert job.run() == JobOutcome(1, True) and time.monotonic() - started < 60
    assert "rank 2 on b was killed by SIGKILL; the system may be out of memory" in capsys.readouterr().err
    assert all_gone(job)


def test_a_lost_host_ends_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An agent that is killed takes its rank with it; one that is silent counts as dead after a while."""
    job = Job(tmp_path, "stubborn", silence_seconds=3)

    def freeze() -> None:
        agent = job.supervisor.members.by_rank[2].facts["pid"]
        os.kill(agent, signal.SIGSTOP)
        threading.Timer(12, os.kill, (agent, signal.SIGCONT)).start()

    job.when_running(freeze)
    assert job.run() == JobOutcome(1, True)
    assert "rank 2 on b is lost: nothing was heard from it for 3 s" in capsys.readouterr().err
    assert all_gone(job)


def test_sigterm_reaches_the_ranks_and_their_answer_is_the_jobs(tmp_path: Path) -> None:
    job = Job(tmp_path, "stop")
    job.when_running(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert job.run() == JobOutcome(75, False) and all_gone(job)


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    job = Job(tmp_path, "stubborn")

    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    job.when_running(twice)
    assert job.run() == JobOutcome(130, False) and all_gone(job)


def test_another_job_lives_on(tmp_path: Path) -> None:
    """Nothing is killed by a name: a process with the same command line is not ours."""
    other = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)", "longctx.launch.cluster.agent", "rank"]
    )
    try:
        assert Job(tmp_path, "raise").run().code == 1
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_host_that_cannot_start_is_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(tmp_path, "note")
    broken = Command("b", (sys.executable, "-c", "import sys; sys.exit('Permission denied (publickey).')"))
    started = time.monotonic()
    assert job.run([*job.commands((0, 1)), broken]) == JobOutcome(1, False, frozenset({"b"}))
    shown = capsys.readouterr().err
    assert "  b  its command ended with exit code 1: Permission denied (publickey)." in shown
    assert not list(tmp_path.glob("rank-*")) and time.monotonic() - started < 30


def test_only_our_own_agents_are_let_in(tmp_path: Path) -> None:
    """A stranger that connects gets nothing, and stops nothing."""
    job = Job(tmp_path, "note")
    address = job.listener.getsockname()
    strangers = [socket.create_connection(address) for _ in range(4)]
    strangers[0].sendall(b'{"token": "wrong", "rank": 0}\n')
    strangers[1].sendall(b"\xff\n[1]\n" * 10)
    strangers[2].sendall(b"[" * 100_000 + b"\n")
    assert job.run() == JobOutcome(0, False)
    for stranger in strangers:
        stranger.settimeout(5)
        try:
            assert stranger.recv(1) == b""
        except ConnectionResetError:
            pass
        stranger.close()


def test_what_can_be_wrong_with_a_host(tmp_path: Path) -> None:
    given = make_spec(tmp_path, config_sha256="", config=str(tmp_path / "none"))
    good = facts.gather(given)
    now = good["clock"]
    assert facts.wrong(good, given, 2, 0, now) == []
    cases = {
        "torch is 1.0 there": {"versions": good["versions"] | {"torch": "1.0"}},
        "clock is 100 s ahead": {"clock": now + 100},
        "storage that all hosts share": {"config": "other"},
        "cannot be written": {"writable": False},
        "0.0 GiB free": {"disk": 5},
        "working directory": {"folder": False},
        "it has GPUs": {"gpus": 2},
        "no compiler": {"toolchain": "no compiler"},
    }
    for text, change in cases.items():
        (found,) = facts.wrong(good | change, given, 2, 0, now)
        assert text in found
    assert "1 GPUs for 2 ranks" in facts.wrong(good | {"gpus": 1}, given, 2, 2, now)[0]


def test_40_secrets_in_the_shell_are_in_no_argument_log_or_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    canaries = [f"canary-{number:02d}-{os.urandom(6).hex()}" for number in range(40)]
    for number, canary in enumerate(canaries):
        monkeypatch.setenv(f"SECRET_{number}" if number % 2 else f"API_{number}_TOKEN", canary)
    travels = {f"SECRET_{number}": canaries[number] for number in range(1, 40, 2)}  # put on the list by the user
    job = Job(tmp_path, "raise", environment=travels)
    seen: list[bytes] = []

    def look() -> None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen.append(path.read_bytes())
            except OSError:
                pass

    watcher = threading.Thread(target=lambda: [look() or time.sleep(0.2) for _ in range(20)])
    watcher.start()
    job.run()
    watcher.join()
    job.path.unlink()
    shown = "".join(capfd.readouterr())
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    everything = b"".join([*seen, *files, shown.encode()])
    assert seen and files and not [canary for canary in canaries if canary.encode() in everything]
