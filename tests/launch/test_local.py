"""The local launcher: every rank is started right, the first cause is shown once, and no process is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import write

from longctx.config.load import load
from longctx.errors import CheckpointError, LaunchError
from longctx.launch import hardware, local
from longctx.launch import rank as entry
from longctx.train import folder
from longctx.train.lock import FolderLock

SCRIPT = Path(__file__).with_name("ranks_for_tests.py")
JOB = (
    "import sys, pathlib; from longctx.launch import local\n"
    "sys.exit(local.run([sys.executable, *sys.argv[2:]], world=2, logs=pathlib.Path(sys.argv[1])))"
)


def run(what: str, folder: Path) -> int:
    return local.run([sys.executable, str(SCRIPT), what, str(folder)], world=2, logs=folder / "logs")


def pids(folder: Path, kind: str = "pid") -> list[int]:
    texts = [path.read_text() for path in sorted(folder.glob(f"{kind}-*"))]
    return [int(text) for text in texts if text]  # a rank is just writing the others


def gone(process: int) -> bool:
    """Whether a process has ended (a zombie that nobody waits for counts as ended)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[object]:
    """Start a job in a process of its own and wait until both ranks run."""
    started: list[subprocess.Popen[str]] = []

    def start(what: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", JOB, str(tmp_path / "logs"), str(SCRIPT), what, str(tmp_path)]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        wait_for(lambda: len(pids(tmp_path)) == 2)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_every_rank_gets_its_place(tmp_path: Path) -> None:
    assert run("note", tmp_path) == 0
    threads = hardware.threads_per_rank(2)
    for rank in range(2):
        assert (tmp_path / f"rank-{rank}").read_text() == f"2 {rank} {threads} 127.0.0.1 lo"
        assert (tmp_path / "logs" / f"rank-{rank:05d}.log").exists()


def test_ranks_meet_at_the_socket_that_was_handed_over(tmp_path: Path) -> None:
    assert run("meet", tmp_path) == 0
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == ["3", "3"]


def test_a_bug_on_one_rank_is_shown_once_with_its_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    assert run("raise", tmp_path) == 1
    assert time.monotonic() - start < 15
    shown = capsys.readouterr().err
    assert shown.startswith("longctx: rank 1 failed") and shown.endswith("RuntimeError: a bug in rank one\n")
    assert shown.count("Traceback") == 1
    assert all(gone(process) for process in pids(tmp_path))


def test_a_users_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("user", tmp_path) == 1
    assert capsys.readouterr().err == "longctx: corpus.bin is truncated\n"


def test_a_killed_rank_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("segfault", tmp_path) == 1
    assert "rank 1 was killed by SIGSEGV" in capsys.readouterr().err


def test_sigterm_reaches_the_ranks_and_their_answer_is_the_jobs(tmp_path: Path, job: object) -> None:
    process = job("stop")  # type: ignore[operator]
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert all(gone(pid) for pid in pids(tmp_path))


STOPS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75, signal.SIGHUP: 143}


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_before_ranks_can_answer_is_one_sentence(tmp_path: Path, job: object, number: signal.Signals) -> None:
    """As while a rank imports torch: it has neither a handler nor a report yet."""
    process = job("idle")  # type: ignore[operator]
    process.send_signal(number)
    assert process.wait(20) == STOPS[number]
    said = process.stderr.read()
    assert said == f"longctx: stopped by {number.name} before the first step; nothing was lost, start again to train\n"


def test_a_signal_that_comes_before_the_ranks_are_started_reaches_them(tmp_path: Path) -> None:
    early = (
        "import sys, pathlib, os, signal; from longctx.launch import local\n"
        "begin = local._Job.start\n"
        "def start(self, *rest):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    begin(self, *rest)\n"
        "local._Job.start = start\n"
        "sys.exit(local.run([sys.executable, *sys.argv[2:]], world=2, logs=pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", early, str(tmp_path / "logs"), str(SCRIPT), "idle", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 143 and "stopped by SIGTERM before the first step" in done.stderr


def test_the_end_of_a_log_is_that_of_this_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    for rank in range(2):
        (tmp_path / "logs" / f"rank-{rank:05d}.log").write_text("an error of yesterday\n")
    assert run("segfault", tmp_path) == 1
    assert "yesterday" not in capsys.readouterr().err
    assert "yesterday" in (tmp_path / "logs" / "rank-00001.log").read_text()


def test_a_closed_standard_output_is_no_other_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", JOB, str(tmp_path / "logs"), str(SCRIPT), "console", str(tmp_path)]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "console").read_text() == os.devnull


def test_sigusr2_shows_where_every_rank_is_and_ends_nothing(tmp_path: Path, job: object) -> None:
    process = job("stop")  # type: ignore[operator]
    process.send_signal(signal.SIGUSR2)
    logs = sorted(tmp_path.rglob("rank-*.log"))
    wait_for(lambda: all("time.sleep" in log.read_text() or "in behave" in log.read_text() for log in logs))
    assert len(logs) == len(pids(tmp_path)) and process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    script = "import os, signal; from longctx.launch import rank; rank.main(['--config', 'none']); "
    script += "os.kill(os.getpid(), signal.SIGUSR2); print('alive')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "alive\n" and "most recent call first" in done.stderr


def test_a_second_ctrl_c_kills(tmp_path: Path, job: object) -> None:
    process = job("stubborn")  # type: ignore[operator]
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert all(gone(pid) for pid in pids(tmp_path))


def test_ranks_die_with_a_launcher_that_is_killed(tmp_path: Path, job: object) -> None:
    process = job("stubborn")  # type: ignore[operator]
    process.kill()
    wait_for(lambda: all(gone(pid) for pid in pids(tmp_path)))


def test_what_a_rank_started_is_killed_too(tmp_path: Path, job: object) -> None:
    process = job("child")  # type: ignore[operator]
    os.kill(pids(tmp_path)[1], signal.SIGKILL)
    assert process.wait(20) == 1
    assert all(gone(pid) for pid in pids(tmp_path) + pids(tmp_path, "child"))
    assert "rank 1 was killed by SIGKILL; the system may be out of memory" in process.stderr.read()


def test_a_port_in_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(LaunchError, match=f"MASTER_PORT={other.getsockname()[1]} cannot be used"):
            run("note", tmp_path)
    monkeypatch.setenv("MASTER_PORT", "99999999")
    with pytest.raises(LaunchError, match="cannot be used"):
        run("note", tmp_path)


def test_a_machine_without_loopback_is_named_before_ranks_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*address: object, **options: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(LaunchError, match="Network is unreachable.*ip link set lo up"):
        run("note", tmp_path)
    assert not list((tmp_path / "logs").iterdir())


def test_ranks_get_the_configuration_as_it_was_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    config = load(path, ["train.lr=0.5"])
    path.write_text("changed meanwhile")
    seen = []

    def watched(command: list[str], **options: Any) -> int:
        for name, value in options["environment"].items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("LONGCTX_PARENT", "1")
        seen.append(entry._load(path, []))
        return 0

    monkeypatch.setattr(local, "run", watched)
    monkeypatch.setattr(local, "prepare", lambda: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert local.train(config, path, ["train.lr=0.5"], world=2) == 0
    assert seen == [(config, None)]
    monkeypatch.delenv("LONGCTX_PARENT")  # torchrun, say: every rank reads the YAML
    assert entry._load(path, [])[0] is None


def test_a_folder_in_use_or_without_its_checkpoints_is_refused_before_ranks_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "run", lambda *_, **__: pytest.fail("ranks were started"))
    monkeypatch.setattr(local, "prepare", lambda: None)
    path = write(tmp_path)
    with FolderLock(tmp_path / "run"), pytest.raises(CheckpointError, match=f"in use by another run .*{os.getpid()}"):
        local.train(load(path), path, [], world=2)
    folder.note_saved(tmp_path / "run", 7)
    with pytest.raises(CheckpointError, match="saved step 7, but .* holds no checkpoint"):
        local.train(load(path), path, [], world=2)


def test_a_log_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(LaunchError, match="another output.folder"):
        run("note", tmp_path)
