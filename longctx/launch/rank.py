"""One rank of a training job under any launcher: longctx's own, deepspeed, torchrun, mpirun or srun.

``python -m longctx.launch.rank --config run.yaml [a.b=c …]`` with RANK, WORLD_SIZE etc. in the environment.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longctx.errors import ConfigError, LaunchError
from longctx.launch import hardware, report
from longctx.launch.environment import RESOLVED
from longctx.launch.rank_process import console, die_with_parent, end, join, print_error, show_stacks, world_size
from longctx.train.report.console import guard_standard_streams
from longctx.train.signals import StopFlag, code_of, sentence_of
from longctx.world import launched_world

if TYPE_CHECKING:
    from longctx.config.schema import RunConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank's job and return its exit code.

    0: done; 75: stopped after saving; 1: failed; 130, 143 or 75: stopped by a signal before the first step.
    """
    die_with_parent()
    guard_standard_streams()
    show_stacks()
    options = _parse(arguments)
    _, rank = launched_world()
    with StopFlag(before_training=lambda number: _stop(rank, number)) as stop:
        try:
            return _train(options.config, options.overrides, rank, stop)
        except BaseException as error:
            if not report.leave(rank, error):
                print_error(rank, error)
            return 1


def _give_up(rank: int, text: str) -> None:
    """Exit at once with ``text``: another rank is frozen, and the main thread may be waiting for it in a library."""
    error = LaunchError(text)
    if not report.leave(rank, error):
        print(f"longctx: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _stop(rank: int, number: int) -> None:
    """Exit at once after a signal before the first step: there is nothing to save, and ranks may wait for others."""
    error = LaunchError(sentence_of(number))
    if not report.leave(rank, error) and rank == 0:
        print(f"longctx: {error}", file=sys.stderr, flush=True)
    os._exit(code_of(number))


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
        raise problem  # most likely all ranks have it; rank 0 reports it at once
    threads = hardware.threads_per_rank(_local_ranks())
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if hardware.gpus() == 0:
        from longctx.engine.cpu_extension import load_extension

        os.environ["DS_ACCELERATOR"] = "cpu"
        load_extension()

    import torch

    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    join(rank)
    if config is None:
        from longctx.train.same_start import compare_start

        compare_start(None, problem)  # raises on all ranks: the others are in this comparison too
    assert config is not None
    from longctx.train.run import run

    columns = int(os.environ.get("LONGCTX_COLUMNS", "0"))
    code = run(config, console=console(rank), columns=columns, stop=stop, give_up=lambda text: _give_up(rank, text))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return code


def _load(path: Path, overrides: list[str]) -> tuple[RunConfig | None, ConfigError | None]:
    """Return (configuration, None) or (None, error). Our own launcher passes the configuration already resolved."""
    from longctx.config.load import load, load_for_rank

    resolved = os.environ.get(RESOLVED) if "LONGCTX_PARENT" in os.environ else None
    try:
        return (load(resolved) if resolved else load_for_rank(path, overrides, default_world=world_size())), None
    except ConfigError as error:
        return None, error


def _local_ranks() -> int:
    """Return the number of ranks on this host: from the launcher's variables, else the world size."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE")
    found = [os.environ[name] for name in names if os.environ.get(name, "").isdigit()]
    return max(int(found[0]), 1) if found else world_size()


if __name__ == "__main__":
    end(main())
