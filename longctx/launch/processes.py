"""Processes that we started, each the leader of a session of its own: how they ended, and how to end them all."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence

Process = subprocess.Popen[bytes]


def exit_code(process: Process) -> int | None:
    """Return how a process ended (negative: the signal), or None while it runs.

    Unlike ``poll`` this leaves the ended process in the process table, so that its id, by which ``kill`` reaches what
    it started, cannot come to mean another process.
    """
    if process.returncode is not None:
        return process.returncode
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def kill(processes: Sequence[Process]) -> None:
    """Kill what is left of every process and of its session, by their own ids, and wait until they are gone."""
    for process in processes:
        if process.returncode is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # its session's id is its process id
            except ProcessLookupError:
                pass
    for process in processes:
        process.wait()
