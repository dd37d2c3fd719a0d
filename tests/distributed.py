"""Run a function on several gloo ranks: one living pool of worker processes per world size.

Spawning ranks costs seconds (each imports torch), so a pool lives for the whole test run. Rendezvous is a file, not a
port. A rank that fails or hangs fails the test with its own traceback, and its pool is thrown away.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib.util
import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_pools: dict[int, Pool] = {}
_LARGEST = 3 << 30  # bytes: ranks that have grown beyond it are replaced, so that the others do not run out of memory
_PATIENCE = 4  # a time limit is there to name a hung rank, not to measure a machine that others share


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time."""


def run_ranks(world_size: int, worker: Any, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``worker(rank, world_size, *args)`` on every rank at once and return the results in rank order.

    Args:
        worker: a module-level function of a test file (workers load that file by its path).
        args: picklable arguments, the same for every rank.
        timeout: seconds for all ranks together on a quiet machine; the error names the ranks that did not answer.
    """
    timeout *= _PATIENCE
    pool = _pools.get(world_size)
    if pool is None or not pool.alive():
        if pool is not None:
            pool.close()
        pool = _pools[world_size] = Pool(world_size)
    keep = False
    try:
        results = pool.run(worker, args, timeout)
        keep = not pool.outgrown
        return results
    finally:
        if not keep:  # its ranks may be out of step with each other, or hold memory that others need
            pool.close()
            del _pools[world_size]


class Pool:
    """``world_size`` processes with torch.distributed up, waiting for work."""

    def __init__(self, world_size: int) -> None:
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="longctx-ranks-")
        self.processes, self.pipes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, self.folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
        self.outgrown = 0  # bytes of the largest rank, once that is too much
        self.stacks = [Path(self.folder.name) / f"stack-{rank}" for rank in range(world_size)]

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def run(self, worker: Any, args: tuple[Any, ...], timeout: float) -> list[Any]:
        job = (str(Path(sys.modules[worker.__module__].__file__ or "").resolve()), worker.__qualname__, args)
        for pipe in self.pipes:
            pipe.send((*job, timeout))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        failures: list[str] = []
        while len(results) < len(self.pipes) and not failures:
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in results}
            ready = wait(list(waiting), max(deadline - time.monotonic(), 0))
            if not ready:
                failures.append(self._hung(sorted(waiting.values()), timeout))
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    good, value, size = pipe.recv()  # type: ignore[union-attr]
                    if size > max(_LARGEST, self.outgrown):
                        self.outgrown = size
                        warnings.warn(f"rank {rank} holds {size >> 20} MiB after {job[1]}", stacklevel=3)
                except EOFError:
                    self.processes[rank].join(5)
                    good, value = False, f"the process died (exit code {self.processes[rank].exitcode})"
                if good:
                    results[rank] = value
                else:
                    failures.append(f"rank {rank} of {len(self.pipes)}: {value}")
        if failures:
            raise RankFailure("\n".join(failures))
        return [results[rank] for rank in range(len(self.pipes))]

    def _hung(self, ranks: list[int], timeout: float) -> str:
        stacks = "\n".join(f"--- rank {r}\n{self.stacks[r].read_text()}" for r in ranks if self.stacks[r].is_file())
        return f"ranks {ranks} gave no answer within {timeout:.0f} s\n{stacks}"

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()


def _serve(rank: int, world_size: int, folder: str, pipe: Connection) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", LOCAL_RANK=str(rank), RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size), TOKENIZERS_PARALLELISM="false")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29999", HF_HUB_OFFLINE="1")
    import torch
    import torch.distributed as dist
    from conftest import poison_uninitialised_memory

    torch.set_num_threads(1)
    poison_uninitialised_memory()
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=600))
    stack = open(Path(folder) / f"stack-{rank}", "w")  # noqa: SIM115  (faulthandler writes to it while we hang)
    while True:
        try:
            path, name, args, timeout = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(max(timeout - 2, timeout / 2), file=stack)
        try:
            function = _load(path)
            for part in name.split("."):
                function = getattr(function, part)
            answer = (True, function(rank, world_size, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        pipe.send((*answer, _resident_bytes()))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _load(path: str) -> Any:
    """Import a test file by its path, once per process."""
    name = "ranks_" + path.replace("/", "_").removesuffix(".py")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@atexit.register
def _close_all() -> None:
    for pool in _pools.values():
        pool.close()
