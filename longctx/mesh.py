"""Mesh: the data × ring × ulysses grid of ranks, and the ``mpu`` object that DeepSpeed queries.

Constructing a Mesh is arithmetic only, so the planner or a test can build one for a thousand ranks. The first access to
a group connects it: torch.distributed is initialized if it is not yet, and all ranks create the groups in one order.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from longctx.errors import MeshError
from longctx.world import launched_world

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

_registered: dict[str, Mesh] = {}


def from_key(key: str) -> Mesh:
    """Return the mesh registered under ``key`` in this process; custom operators take the key, not the object."""
    if key not in _registered:
        raise MeshError(f"mesh {key!r} was never made in this process; build longctx.Mesh before running the model")
    return _registered[key]


class Cut:
    """Number and checksum of the integer tensors that ``longctx.shard`` has sharded over one mesh."""

    def __init__(self) -> None:
        self.count = 0
        self.checksum: torch.Tensor | int = 0  # () int64, on the tensors' device

    def add(self, x: torch.Tensor) -> None:
        """Add one unsharded tensor."""
        from longctx.sameness import checksum

        self.count += 1
        self.checksum = self.checksum * 31 + checksum(x)


class Mesh:
    """A grid of ``data × ring × ulysses`` ranks.

    ``rank = ((data_rank · ring) + ring_rank) · ulysses + ulysses_rank``: the ranks of a ulysses group are adjacent
    (within a node), then come ring neighbours; data replicas are furthest apart.

    Args:
        ring: ranks that share one sequence by ring attention.
        ulysses: ranks that share one sequence by all-to-all of heads.
        data: data-parallel replicas; None derives it from the world size.
        world_size: total number of ranks; default torch.distributed's, else ``WORLD_SIZE``, else 1.
        rank: of this process; default torch.distributed's, else ``RANK``, else 0. Set it only to inspect another rank's
            view of the grid.
        patience: seconds that a rank of an engine waits for the others at the start of a window, an evaluation or a
            checkpoint before it raises and names the missing ranks.

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
        found_world, found_rank = launched_world()
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
        self._models: list[weakref.ref[torch.nn.Module]] = []
        self._groups: dict[str, dist.ProcessGroup] | None = None

    # -- models that are attached ---------------------------------------------------------------------------------

    def add_model(self, model: torch.nn.Module) -> None:
        """Remember that ``model`` is attached to this mesh, for as long as it lives."""
        if model not in self.attached_models():
            self._models.append(weakref.ref(model))

    def attached_models(self) -> list[torch.nn.Module]:
        """Return the living models that are attached to this mesh, in the order of ``longctx.attach``."""
        return [model for found in self._models if (model := found()) is not None]

    # -- the members of this rank's groups, as global ranks -------------------------------------------------------

    def rank_at(self, data: int, ring: int, ulysses: int) -> int:
        """Return the global rank at one point of the grid."""
        return (data * self.ring_size + ring) * self.ulysses_size + ulysses

    @property
    def ring_ranks(self) -> tuple[int, ...]:
        """Global ranks of this rank's ring, in ring order."""
        return tuple(self.rank_at(self.data_rank, r, self.ulysses_rank) for r in range(self.ring_size))

    @property
    def ulysses_ranks(self) -> tuple[int, ...]:
        """Global ranks of this rank's ulysses group, in order."""
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
        """Create the process groups. Idempotent; collective over the world.

        Initializes torch.distributed if it is not yet: from the environment variables of torchrun or deepspeed, then
        those of OpenMPI, PMI and SLURM, then mpi4py, else as one process. A later ``deepspeed.init_distributed`` uses
        the same world.

        Raises:
            MeshError: on every rank, when the ranks ask for different grids.
        """
        if self._groups is not None:
            return self
        from longctx import rendezvous
        from longctx.sameness import compare_grids

        rendezvous.start(self.world_size, self.rank)
        grid = (self.data_size, self.ring_size, self.ulysses_size)
        compare_grids(self.ring_size, self.ulysses_size, self.data_size)
        self._groups = rendezvous.make_groups(grid, self._partitions(), self.rank)
        return self

    def _partitions(self) -> dict[str, list[list[int]]]:
        """Return the groups of all ranks, by name."""
        data, ring, ulysses = range(self.data_size), range(self.ring_size), range(self.ulysses_size)
        return {
            "ring": [[self.rank_at(d, r, u) for r in ring] for d in data for u in ulysses],
            "ulysses": [[self.rank_at(d, r, u) for u in ulysses] for d in data for r in ring],
            "sequence": [[self.rank_at(d, r, u) for r in ring for u in ulysses] for d in data],
            "data": [[self.rank_at(d, r, u) for d in data] for r in ring for u in ulysses],
        }

    def _group(self, name: str) -> dist.ProcessGroup:
        self.connect()
        assert self._groups is not None
        return self._groups[name]

    @property
    def ring_group(self) -> dist.ProcessGroup:
        """Ranks of this rank's ring, with a communicator that only ring attention uses."""
        return self._group("ring")

    @property
    def ulysses_group(self) -> dist.ProcessGroup:
        """Ranks of the all-to-all of heads."""
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
        """This rank's device: its local GPU, or the CPU if there is none or DS_ACCELERATOR is cpu."""
        from longctx import rendezvous

        return rendezvous.local_device()

    # -- the mpu that DeepSpeed queries -----------------------------------------------------------------------------
    # ZeRO shards over data × sequence, i.e. the whole world, and averages over world / sequence_parallel_size.
    # get_data_parallel_* is left out on purpose: with it DeepSpeed would shard ZeRO-3 over the replicas only.

    def initialize_sequence_parallel(self, sequence_parallel_size: int | None = None) -> None:
        """Connect. DeepSpeed takes an mpu that has this attribute for one with sequence parallelism only."""
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

    # For gradient norms and overflow checks DeepSpeed counts replicated values once per model-parallel group; here that
    # is the sequence group.
    get_model_parallel_group = get_sequence_parallel_group
    get_model_parallel_world_size = get_sequence_parallel_world_size
    get_model_parallel_rank = get_sequence_parallel_rank

    # Universal checkpoints read the tensor-parallel degree; without these they would use the sequence group's size.
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
