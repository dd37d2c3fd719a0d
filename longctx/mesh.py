"""Mesh: the data × ring × ulysses grid of ranks, and the mpu that DeepSpeed asks about it.

Until it is used a Mesh is arithmetic only, so a planner or a test can build one for a thousand ranks. Asking for a
group connects it: torch.distributed is started if nobody has, and the groups are made, by all ranks in one order.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from longctx.errors import MeshError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

_registered: dict[str, Mesh] = {}


def from_key(key: str) -> Mesh:
    """Return the mesh that this process registered under ``key`` (custom operators carry the key, not the object)."""
    if key not in _registered:
        raise MeshError(f"mesh {key!r} was never made in this process; build longctx.Mesh before running the model")
    return _registered[key]


class Cut:
    """The integers that ``longctx.shard`` has sharded over one mesh so far: how many tensors, and a checksum of all."""

    def __init__(self) -> None:
        self.count = 0
        self.checksum: torch.Tensor | int = 0  # () int64, on the tensors' device

    def add(self, x: torch.Tensor) -> None:
        """Count a whole tensor."""
        from longctx.sameness import checksum

        self.count += 1
        self.checksum = self.checksum * 31 + checksum(x)


class Mesh:
    """A grid of ``data × ring × ulysses`` ranks.

    ``rank = ((data_rank · ring) + ring_rank) · ulysses + ulysses_rank``: ulysses members are adjacent (inside a
    node), then ring neighbours, and data replicas are furthest apart.

    Args:
        ring: ranks that share one sequence by passing keys and values around.
        ulysses: ranks that share one sequence by exchanging heads.
        data: replicas; inferred from the world when None.
        world_size: ranks in all; torch.distributed's, else ``WORLD_SIZE``, else 1.
        rank: this process; torch.distributed's, else ``RANK``, else 0. Give it only to look at another rank's view.
        patience: seconds that a rank waits for the others at the start of a window, an evaluation or a checkpoint of an
            engine before it stops and names those that are missing.

    Raises:
        MeshError: a size is not a positive integer, or the grid does not fill the world.
    """

    def __init__(
        self,
        ring: int = 1,
        ulysses: int = 1,
        data: int | None = None,
        *,
        world_size: int | None = None,
        rank: int | None = None,
        patience: float = 600.0,
    ) -> None:
        for name, size in (("ring", ring), ("ulysses", ulysses), ("data", data), ("world_size", world_size)):
            if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise MeshError(f"Mesh({name}={size!r}): sizes are positive integers")
        if not patience > 0:
            raise MeshError(f"Mesh(patience={patience!r}): a positive number of seconds is needed")
        self.patience = patience
        found_world, found_rank = _discover()
        if world_size is None:
            world_size = found_world or 1
        if data is None:
            data = max(world_size // (ring * ulysses), 1)
        if ring * ulysses * data != world_size:
            raise MeshError(
                f"Mesh(ring={ring}, ulysses={ulysses}, data={data}) is a grid of {ring * ulysses * data} ranks, but "
                f"the world has {world_size}: choose ring x ulysses that divides {world_size}, or start "
                f"{ring * ulysses * data} ranks"
            )
        self.ring_size, self.ulysses_size, self.data_size, self.world_size = ring, ulysses, data, world_size
        self.sequence_size = ring * ulysses
        self.rank = found_rank if rank is None else rank
        if not 0 <= self.rank < world_size:
            raise MeshError(f"rank {self.rank} is outside a world of {world_size} ranks")
        self.ulysses_rank = self.rank % ulysses
        self.ring_rank = self.rank // ulysses % ring
        self.data_rank = self.rank // self.sequence_size
        self.sequence_rank = self.rank % self.sequence_size
        self.key = f"mesh-{len(_registered)}-data{data}-ring{ring}-ulysses{ulysses}"
        _registered[self.key] = self
        self.cut = Cut()
        self._groups: dict[str, dist.ProcessGroup] | None = None

    # -- who shares what with this rank, as global ranks ---------------------------------------------------------

    def rank_at(self, data: int, ring: int, ulysses: int) -> int:
        """Return the global rank at a grid point."""
        return (data * self.ring_size + ring) * self.ulysses_size + ulysses

    @property
    def ring_ranks(self) -> tuple[int, ...]:
        """Global ranks of this rank's ring, in ring order."""
        return tuple(self.rank_at(self.data_rank, r, self.ulysses_rank) for r in range(self.ring_size))

    @property
    def ulysses_ranks(self) -> tuple[int, ...]:
        """Global ranks this rank exchanges heads with."""
        return tuple(self.rank_at(self.data_rank, self.ring_rank, u) for u in range(self.ulysses_size))

    @property
    def sequence_ranks(self) -> tuple[int, ...]:
        """Global ranks that together hold one sequence."""
        first = self.data_rank * self.sequence_size
        return tuple(range(first, first + self.sequence_size))

    @property
    def data_ranks(self) -> tuple[int, ...]:
        """Global ranks that hold the same part of different sequences."""
        return tuple(self.rank_at(d, self.ring_rank, self.ulysses_rank) for d in range(self.data_size))

    # -- groups ----------------------------------------------------------------------------------------------------

    def connect(self) -> Mesh:
        """Make the process groups (idempotent; collective: every rank of the world must call it).

        Starts torch.distributed if nothing else has: environment variables (torchrun, deepspeed), then OpenMPI, PMI
        and SLURM variables, then mpi4py, else one process. ``deepspeed.init_distributed`` afterwards adopts it.

        Raises:
            MeshError: on every rank, when the ranks ask for different grids.
        """
        if self._groups is not None:
            return self
        from longctx import rendezvous
        from longctx.sameness import compare_grids

        rendezvous.start(self.world_size, self.rank)
        compare_grids(self)
        self._groups = rendezvous.make_groups(self)
        return self

    def _group(self, name: str) -> dist.ProcessGroup:
        self.connect()
        assert self._groups is not None
        return self._groups[name]

    @property
    def ring_group(self) -> dist.ProcessGroup:
        """The ring's own communicator; used by nothing but ring attention."""
        return self._group("ring")

    @property
    def ulysses_group(self) -> dist.ProcessGroup:
        """Ranks that exchange heads."""
        return self._group("ulysses")

    @property
    def sequence_group(self) -> dist.ProcessGroup:
        """Ranks that together hold one sequence."""
        return self._group("sequence")

    @property
    def data_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same part of different sequences."""
        return self._group("data")

    @property
    def world_group(self) -> dist.ProcessGroup:
        """Every rank of the job."""
        return self._group("world")

    @property
    def device(self) -> torch.device:
        """This rank's device: the local GPU if the machine has one (and DS_ACCELERATOR does not say cpu)."""
        from longctx import rendezvous

        return rendezvous.local_device()

    # -- the mpu that DeepSpeed asks --------------------------------------------------------------------------------
    # ZeRO shards over data × sequence, i.e. the whole world, and averages over world / sequence_parallel_size.
    # There is deliberately no get_data_parallel_*: DeepSpeed would shard ZeRO-3 over the replicas only.

    def initialize_sequence_parallel(self, sequence_parallel_size: int | None = None) -> None:
        """Connect; to DeepSpeed this attribute marks an mpu that only splits sequences."""
        if sequence_parallel_size not in (None, self.sequence_size):
            raise MeshError(f"sequence_parallel_size {sequence_parallel_size} is not the mesh's {self.sequence_size}")
        self.connect()

    def get_sequence_parallel_group(self) -> Any:
        return self.sequence_group

    def get_sequence_parallel_world_size(self) -> int:
        return self.sequence_size

    def get_sequence_parallel_rank(self) -> int:
        return self.sequence_rank

    def get_sequence_data_parallel_group(self) -> Any:
        return self.world_group

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.world_size

    def get_sequence_data_parallel_rank(self) -> int:
        return self.rank

    # Gradient norms and overflow checks treat the sequence group as "model parallel": only its first rank counts.
    get_model_parallel_group = get_sequence_parallel_group
    get_model_parallel_world_size = get_sequence_parallel_world_size
    get_model_parallel_rank = get_sequence_parallel_rank

    # Universal checkpoints ask for a tensor-parallel degree; without these they would take the sequence's.
    def get_tensor_model_parallel_group(self) -> Any:
        return self._group("self")

    def get_tensor_model_parallel_world_size(self) -> int:
        return 1

    def get_tensor_model_parallel_rank(self) -> int:
        return 0

    def __repr__(self) -> str:
        return (
            f"Mesh(ring={self.ring_size}, ulysses={self.ulysses_size}, data={self.data_size}, rank={self.rank}: "
            f"ring_rank={self.ring_rank}, ulysses_rank={self.ulysses_rank}, data_rank={self.data_rank})"
        )


_SCHEDULERS = (  # (world size, rank) as set by torchrun and deepspeed, OpenMPI, MPICH/PMI, SLURM
    ("WORLD_SIZE", "RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def _discover() -> tuple[int | None, int]:
    """Return (world size or None, rank) of this process without starting anything; a world of one is no job."""
    import sys

    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(), distributed.get_rank()
    found = _scheduled()
    return (None, 0) if found is None else (found[2], found[3])


def launched_by() -> str | None:
    """Return the environment variables by which a launcher says that this is one of several ranks; None without."""
    found = _scheduled()
    return None if found is None else f"{found[0]}={found[2]}, {found[1]}={found[3]}"


def _scheduled() -> tuple[str, str, int, int] | None:
    """Return (variable of the world size, of the rank, world size, rank) of the first launcher of several ranks."""
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
