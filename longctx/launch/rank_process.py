"""What every rank process does around its work: end with its launcher, join the other ranks, report errors, exit."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from typing import TextIO

from longctx.errors import ConfigError, LongctxError
from longctx.launch import hardware, report
from longctx.world import launched_world


def die_with_parent() -> None:
    """Ask the kernel to kill this rank when our launcher dies, however that happens."""
    parent = os.environ.get("LONGCTX_PARENT")
    if parent is None or not sys.platform.startswith("linux"):
        return
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != int(parent):
        os._exit(1)  # the launcher died before the request above


def show_stacks() -> None:
    """Write every thread's stack to stderr (this rank's log) on a crash and on SIGUSR2."""
    stream = getattr(sys.stderr, "stream", sys.stderr)
    if stream is not None:
        faulthandler.enable(stream)
        faulthandler.register(signal.SIGUSR2, stream)


def world_size() -> int:
    """Return the number of ranks, as the launcher's environment variables say; 1 without a launcher."""
    return launched_world()[0] or 1


def join(rank: int) -> None:
    """Initialize torch.distributed over the socket that our own launcher opened.

    Under any other launcher this does nothing; the mesh initializes torch.distributed later.
    """
    if "LONGCTX_PARENT" not in os.environ:
        return
    import torch
    import torch.distributed as dist

    from longctx.rendezvous import local_device

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listener = os.environ.get("LONGCTX_LISTENER")
    inherited = {"is_master": True, "master_listen_fd": int(listener)} if listener else {}
    store = dist.TCPStore(address, port, world_size(), wait_for_workers=False, **inherited)  # type: ignore[arg-type]
    backend = "gloo"
    if hardware.gpus() > 0:
        torch.cuda.set_device(local_device())
        backend = "nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size())


def console(rank: int) -> TextIO | None:
    """Return the stream on which rank 0 writes to the user; None on the other ranks."""
    if rank != 0:
        return None
    inherited = os.environ.get("LONGCTX_CONSOLE")
    return os.fdopen(int(inherited), "w", buffering=1, errors="backslashreplace") if inherited else sys.stdout


def print_error(rank: int, error: BaseException) -> None:
    """Print an error where no launcher of ours collects it. Only rank 0 prints a ConfigError: all ranks have it."""
    if rank == 0 or not isinstance(error, ConfigError):
        where = "" if isinstance(error, LongctxError) and rank == 0 else f"rank {rank}: "
        print(f"longctx: {where}{report.text_of(error)}", file=sys.stderr, flush=True)


def end(code: int) -> None:
    """Exit with ``code``; after a failure without clean-up, which could wait forever for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code not in (0, 75):
        os._exit(code)
    sys.exit(code)
