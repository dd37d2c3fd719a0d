"""Child processes, each the leader of its own session: read their exit codes, kill them with their descendants."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

Process = subprocess.Popen[bytes]
DESCENDANTS_SECONDS = (
    5.0  # for the kernel to end descendants; a host whose first process reaps nobody keeps them as zombies
)


def exit_code(process: Process) -> int | None:
    """Return a process's exit code (negative: the signal that killed it), or None while it runs.

    Unlike ``Popen.poll`` this does not reap the process: its id stays reserved, so that ``kill``, which uses it as the
    session's id, cannot hit another process.
    """
    if process.returncode is not None:
        return process.returncode
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def kill(processes: Sequence[Process]) -> None:
    """Kill every process and its session by id, and wait until they have exited, descendants for a few seconds."""
    killed = [process for process in processes if process.returncode is None]
    for process in killed:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its session's id is its process id
    for process in processes:
        process.wait()
    deadline = time.monotonic() + DESCENDANTS_SECONDS
    while any(_has_members(process.pid) for process in killed) and time.monotonic() < deadline:
        time.sleep(0.01)


def _has_members(group: int) -> bool:
    """Return whether a process of the group runs; a zombie that no parent has reaped does not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False
