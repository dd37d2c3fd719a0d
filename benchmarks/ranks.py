"""Start the ranks of a row: new processes over gloo, with rendezvous through a file, so that no port is needed."""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

Worker = Callable[..., Iterator[Any]]
END = "end of the rows"


def run_ranks(ranks: int, worker: Worker, *arguments: Any) -> Iterator[Any]:
    """Iterate ``worker(rank, ranks, *arguments)`` on every rank; yield what rank 0 yields, raise any rank's failure."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="longctx-bench-") as folder:
        answers = [context.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            context.Process(target=_rank, args=(rank, ranks, folder, answers[rank][1], worker, arguments), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for _, ours in answers:
            ours.close()
        pipes = [pipe for pipe, _ in answers]
        try:
            while (values := [_receive(rank, pipe) for rank, pipe in enumerate(pipes)])[0] != END:
                yield values[0]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _receive(rank: int, pipe: Any) -> Any:
    try:
        good, value = pipe.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} of the bench died without a word") from None
    if not good:
        raise RuntimeError(f"rank {rank} of the bench failed:\n{value}")
    return value


def _rank(rank: int, ranks: int, folder: str, pipe: Any, worker: Worker, arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_SIZE=str(ranks))
    os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", KINETO_LOG_LEVEL="99")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
    import traceback
    import warnings

    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed's, about names of collectives
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=10))
        for value in worker(rank, ranks, *arguments):
            pipe.send((True, value))
        dist.barrier()
        pipe.send((True, END))
    except Exception:
        pipe.send((False, traceback.format_exc()))
