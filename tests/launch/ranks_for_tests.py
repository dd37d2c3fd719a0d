"""A rank that behaves as told, to test the launcher with: ``python ranks_for_tests.py WHAT [ARGUMENT]``."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from longctx.errors import DataError
from longctx.launch import report


def behave(what: str, rank: int, argument: str) -> int:
    if what == "note":  # write down the environment and end well
        keys = ("WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
        Path(argument, f"rank-{rank}").write_text(" ".join(os.environ[key] for key in keys))
        return 0
    if what == "environment":
        text = "\0".join(f"{name}={value}" for name, value in os.environ.items())
        Path(argument, f"environment-{rank}").write_text(text)
        return 0
    if what == "console":
        if rank == 0:
            target = os.readlink(f"/proc/self/fd/{os.environ['LONGCTX_CONSOLE']}")
            Path(argument, "console").write_text(target)
        return 0
    if what == "meet":  # really join the others
        import torch

        from longctx.launch import rank_process

        rank_process.join(rank)
        total = torch.tensor([rank + 1])
        torch.distributed.all_reduce(total)
        Path(argument, f"rank-{rank}").write_text(str(int(total)))
        return 0
    if what == "raise" and rank == 1:  # a bug on one rank, the others wait for it
        raise RuntimeError("a bug in rank one")
    if what == "user" and rank == 1:
        raise DataError("corpus.bin is truncated")
    if what == "segfault" and rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "stop":  # as a training loop does: finish on request with exit code 75
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    if what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if what == "child":  # a rank with a process of its own
        child = subprocess.Popen(["sleep", "60"])
        Path(argument, f"child-{rank}").write_text(str(child.pid))
    Path(argument, f"pid-{rank}").write_text(str(os.getpid()))
    time.sleep(60)
    return 0


if __name__ == "__main__":
    from longctx.launch.rank_process import die_with_parent

    die_with_parent()
    faulthandler.register(signal.SIGUSR2)
    number = int(os.environ["RANK"])
    try:
        code = behave(sys.argv[1], number, sys.argv[2])
    except Exception as error:
        report.leave(number, error)
        code = 1
    os._exit(code)
