"""One rank of a training job, whoever started it: longctx's own launcher, deepspeed, torchrun, or a scheduler.

``python -m longctx.launch.rank --config run.yaml [a.b=c …]`` with RANK, WORLD_SIZE and friends in the environment.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from longctx.errors import ConfigError, LaunchError, LongctxError
from longctx.launch import hardware, report
from longctx.launch.environment import RESOLVED
from longctx.mesh import _discover as launched_world
from longctx.train.report.console import guard_standard_streams
from longctx.train.signals import StopFlag, code_of, sentence_of

if TYPE_CHECKING:
    from longctx.config.schema import RunConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank's job and return its exit code: 0 done, 75 stopped after saving, 1 failed; 130, 143 or 75 when a
    signal came before the first step."""
    _die_with_parent()
    guard_standard_streams()
    show_stacks()
    options = _parse(arguments)
    _, rank = launched_world()
    with StopFlag(before_training=lambda number: _stop(rank, number)) as stop:
        try:
            return _train(options.config, options.overrides, rank, stop)
        except BaseException as error:
            if not report.leave(rank, error):
                _print_once(rank, error)
            return 1


def _give_up(rank: int, text: str) -> None:
    """End this process: another rank is frozen, and the main thread may wait for it in a library."""
    error = LaunchError(text)
    if not report.leave(rank, error):
        print(f"longctx: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def show_stacks() -> None:
    """Have a crash, and SIGUSR2 at any time, write every thread's stack to stderr: this rank's log."""
    stream = getattr(sys.stderr, "stream", sys.stderr)
    if stream is not None:
        faulthandler.enable(stream)
        faulthandler.register(signal.SIGUSR2, stream)


def _stop(rank: int, number: int) -> None:
    """End this process: a signal came while there is nothing to save yet, and others may be waited for."""
    error = LaunchError(sentence_of(number))
    if not report.leave(rank, error) and rank == 0:
        print(f"longctx: {error}", file=sys.stderr, flush=True)
    os._exit(code_of(number))


def end(code: int) -> None:
    """Leave the process with ``code``; after a failure at once, since other ranks may never come to a clean end."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code not in (0, 75):
        os._exit(code)
    sys.exit(code)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description="Train one configuration with longctx.")
    parser.add_argument("--config", type=Path, required=True, help="the YAML of the run")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers insert it
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the YAML's")
    return parser.parse_args(arguments)


def _train(path: Path, overrides: list[str], rank: int, stop: StopFlag) -> int:
    """Load the configuration, set up this process, and start the training loop."""
    config, problem = _load(path, overrides)
    if problem is not None and rank == 0:
        raise problem  # most likely every rank's: said at once, by one of them
    threads = hardware.threads_per_rank(_local_ranks())
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if hardware.gpus() == 0:
        from longctx.engine.zero.extension import load_extension

        os.environ["DS_ACCELERATOR"] = "cpu"
        load_extension()

    import torch

    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    _meet(rank)
    if config is None:
        from longctx.train.same_start import compare_start

        compare_start(None, problem)  # raises on all ranks; the others are about to compare their configurations
    assert config is not None
    from longctx.train.run import run

    columns = int(os.environ.get("LONGCTX_COLUMNS", "0"))
    code = run(config, console=_console(rank), columns=columns, stop=stop, give_up=lambda text: _give_up(rank, text))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return code


def _load(path: Path, overrides: list[str]) -> tuple[RunConfig | None, ConfigError | None]:
    """Return the configuration, or what is wrong with it. Our own launcher has resolved it once for all ranks."""
    from longctx.config.load import load, load_for_rank

    resolved = os.environ.get(RESOLVED) if "LONGCTX_PARENT" in os.environ else None
    try:
        return (load(resolved) if resolved else load_for_rank(path, overrides, default_world=_world())), None
    except ConfigError as error:
        return None, error


def _meet(rank: int) -> None:
    """Join the other ranks through the socket that our own launcher opened; elsewhere the mesh does it later."""
    if "LONGCTX_PARENT" not in os.environ:
        return
    import torch
    import torch.distributed as dist

    from longctx.rendezvous import local_device

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listener = os.environ.get("LONGCTX_LISTENER")
    handed = {"is_master": True, "master_listen_fd": int(listener)} if listener else {}
    store = dist.TCPStore(address, port, _world(), wait_for_workers=False, **handed)  # type: ignore[arg-type]
    backend = "gloo"
    if hardware.gpus() > 0:
        torch.cuda.set_device(local_device())
        backend = "nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=_world())


def _world() -> int:
    return launched_world()[0] or 1


def _local_ranks() -> int:
    """Return how many ranks share this host: as the launcher says, else all of them."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE")
    found = [os.environ[name] for name in names if os.environ.get(name, "").isdigit()]
    return max(int(found[0]), 1) if found else _world()


def _console(rank: int) -> TextIO | None:
    """Return where rank 0 talks to the user; None on the other ranks."""
    if rank != 0:
        return None
    handed = os.environ.get("LONGCTX_CONSOLE")
    return os.fdopen(int(handed), "w", buffering=1, errors="backslashreplace") if handed else sys.stdout


def _print_once(rank: int, error: BaseException) -> None:
    """Print an error under a foreign launcher. A mistake in the YAML is every rank's, so only rank 0 names it."""
    if rank == 0 or not isinstance(error, ConfigError):
        where = "" if isinstance(error, LongctxError) and rank == 0 else f"rank {rank}: "
        print(f"longctx: {where}{report.text_of(error)}", file=sys.stderr, flush=True)


def _die_with_parent() -> None:
    """Ask the kernel to kill this rank when our launcher dies, however that happens."""
    parent = os.environ.get("LONGCTX_PARENT")
    if parent is None or not sys.platform.startswith("linux"):
        return
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != int(parent):
        os._exit(1)  # it died before we asked


if __name__ == "__main__":
    end(main())
