"""Find out how many ranks this job has and which one this process is, without starting anything or importing torch."""

from __future__ import annotations

import os
import sys

from longctx.errors import MeshError

_SCHEDULERS = (  # (world size, rank) as set by torchrun and deepspeed, OpenMPI, MPICH/PMI, SLURM
    ("WORLD_SIZE", "RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "RANK")


def launched_world() -> tuple[int | None, int]:
    """Return (world size, rank) from torch.distributed or the launcher's variables; (None, 0) for a single process."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(), distributed.get_rank()
    found = _scheduled()
    return (None, 0) if found is None else (found[2], found[3])


def launched_by() -> str | None:
    """Return the launcher's variables that make this process one of several ranks, as text; None for a single one."""
    found = _scheduled()
    return None if found is None else f"{found[0]}={found[2]}, {found[1]}={found[3]}"


def local_rank() -> int:
    """Return this rank's number on its host, from the launcher's variables; 0 if none is set."""
    return next((int(os.environ[name]) for name in _LOCAL_RANKS if os.environ.get(name, "").isdigit()), 0)


def _scheduled() -> tuple[str, str, int, int] | None:
    """Return (world size variable, rank variable, world size, rank) of the first launcher that started several ranks.

    A world size of 1 does not count: a shell inside torchrun or SLURM has such variables too.
    """
    for world, rank in _SCHEDULERS:
        if world in os.environ and rank in os.environ:
            try:
                size, number = int(os.environ[world]), int(os.environ[rank])
            except ValueError:
                raise MeshError(
                    f"{world}={os.environ[world]!r}, {rank}={os.environ[rank]!r}: both must be integers"
                ) from None
            if size > 1:
                return world, rank, size, number
    return None
