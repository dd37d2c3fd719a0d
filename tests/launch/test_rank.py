"""One rank by itself: a signal is answered at once while it imports, and while it waits for others in a library."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def meeting_point() -> Iterator[socket.socket]:
    """A socket that takes connections and never says a word, as a rank 0 that hangs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(300)
        yield listener


def start(config: Path, listener: socket.socket) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("MASTER_ADDR", "MASTER_PORT")}
    address, port = listener.getsockname()
    given = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "longctx.launch.rank", "--config", str(config)],
        env=kept | given | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_signal_is_answered_while_the_main_thread_waits_in_a_library(
    tmp_path: Path, meeting_point: socket.socket
) -> None:
    """Python runs its handlers only when the library returns: here never."""
    process = start(write(tmp_path), meeting_point)
    try:
        connection, _ = meeting_point.accept()  # it has imported torch and asks for the others
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
        connection.close()
    finally:
        process.kill()
    assert process.returncode == 143 and "Traceback" not in errors + output


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_a_signal_is_answered_while_torch_is_imported(
    tmp_path: Path, meeting_point: socket.socket, number: signal.Signals, code: int
) -> None:
    process = start(write(tmp_path), meeting_point)
    try:
        deadline = time.monotonic() + 120
        while "torch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code and "Traceback" not in errors + output
