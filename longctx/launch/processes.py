"""Child processes, each the leader of its own session: read their exit codes, kill them with their descendants."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence

Process = subprocess.Popen[bytes]


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
    """Kill every process and its session by id, and wait until the processes have exited."""
    for process in processes:
        if process.returncode is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # its session's id is its process id
            except ProcessLookupError:
                pass
    for process in processes:
        process.wait()
