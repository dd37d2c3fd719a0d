"""Starts the ranks of a row: fresh processes over gloo, rendezvous by a file, so that no port is needed."""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


def run_ranks(ranks: int, worker: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``worker(rank, ranks, *arguments)`` on each rank; return rank 0's value. Any rank's failure is raised."""
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
        try:
            values = [_receive(rank, pipe) for rank, (pipe, _) in enumerate(answers)]
        finally:
            for process in processes:
                process.kill()
                process.join()
    return values[0]


def _receive(rank: int, pipe: Any) -> Any:
    try:
        good, value = pipe.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} of the bench died without a word") from None
    if not good:
        raise RuntimeError(f"rank {rank} of the bench failed:\n{value}")
    return value


def _rank(rank: int, ranks: int, folder: str, pipe: Any, worker: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_SIZE=str(ranks))
    os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", KINETO_LOG_LEVEL="99")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
    import traceback

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=10))
        answer = (True, worker(rank, ranks, *arguments))
        dist.barrier()
    except Exception:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
