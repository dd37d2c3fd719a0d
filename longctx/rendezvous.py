"""Initialize torch.distributed under any launcher, and create the process groups of a grid.

Separate from ``mesh``, so that grid arithmetic needs neither torch nor a network.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import time

import torch
import torch.distributed as dist

from longctx import slurm
from longctx.errors import MeshError
from longctx.network import address_of, bind_towards
from longctx.world import local_rank


def local_device() -> torch.device:
    """Return this rank's device: its local GPU, or the CPU if there is none or DS_ACCELERATOR is cpu."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def start(world_size: int, rank: int) -> None:
    """Initialize torch.distributed with ``world_size`` ranks, or check the size of a world that is initialized already.

    Raises:
        MeshError: the running world has another size, or several ranks were started without a common address.
    """
    if not dist.is_initialized():
        device = local_device()
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), world_size=1, rank=0)
        else:
            _export_address(world_size, rank)
            bind_towards(os.environ["MASTER_ADDR"])
            dist.init_process_group(backend, init_method="env://", world_size=world_size, rank=rank)
    if world_size == 1:
        os.environ.setdefault("LOCAL_RANK", str(local_rank()))  # DeepSpeed refuses to start an engine without it
    if dist.get_world_size() != world_size:
        raise MeshError(
            f"this mesh is a grid of {world_size} ranks, but torch.distributed runs {dist.get_world_size()}: "
            f"build the mesh with world_size={dist.get_world_size()} (or leave it out)"
        )
    if dist.get_backend() == "gloo":
        atexit.unregister(_let_threads_finish)
        atexit.register(_let_threads_finish)


def _let_threads_finish() -> None:
    """Before the interpreter exits, let gloo's threads free the tensors of their last collectives.

    Freeing needs the GIL, and a C++ thread that requests the GIL during interpreter shutdown aborts the process
    ("terminate called without an active exception", exit code 134) although all work is done.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(0.2)  # releases the GIL


def _export_address(world_size: int, rank: int) -> None:
    """Set rank, world size and master address in the environment, where env:// and DeepSpeed read them."""
    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("WORLD_SIZE", str(world_size))
    os.environ.setdefault("LOCAL_RANK", str(local_rank()))
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return
    if "SLURM_STEP_NODELIST" in os.environ and not _mpi_started():
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = _slurm_address()
        return
    try:
        from mpi4py import MPI
    except ImportError:
        raise MeshError(
            f"{world_size} ranks, but MASTER_ADDR and MASTER_PORT are not set and mpi4py is not installed: start with "
            "`longctx train`, `deepspeed` or `torchrun`, set both variables, or install longctx[mpi]"
        ) from None
    if MPI.COMM_WORLD.Get_size() != world_size:
        raise MeshError(
            f"{world_size} ranks, but MASTER_ADDR and MASTER_PORT are not set and MPI sees "
            f"{MPI.COMM_WORLD.Get_size()}: start with `longctx train`, `deepspeed`, `torchrun` or `mpirun`"
        )
    address = bytearray(256)  # a raw buffer, because mpi4py's object broadcast unpickles what it receives
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            text = f"{_own_address()} {probe.getsockname()[1]}".encode()
        address[: len(text)] = text
    MPI.COMM_WORLD.Bcast([address, MPI.BYTE], root=0)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = bytes(address).rstrip(b"\0").decode().split()


def _own_address() -> str:
    """Return an address of this host that other hosts can reach: a loopback address only if there is no other."""
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = "127.0.0.1"
    if not named.startswith("127."):
        return named
    found = [address_of(name) for _, name in socket.if_nameindex()]
    return next((one for one in found if one and not one.startswith("127.")), named)


def _mpi_started() -> bool:
    """Return whether mpirun or mpiexec started this rank, perhaps through srun. PMI variables alone do not tell: plain
    srun sets them too."""
    by_srun = os.environ.get("SLURM_STEP_NUM_TASKS")
    return "OMPI_COMM_WORLD_SIZE" in os.environ or os.environ.get("PMI_SIZE", by_srun) != by_srun


def _slurm_address() -> tuple[str, str]:
    """Return address and port for the ranks of a SLURM step: its first host, and a port derived from the job id."""
    try:
        first = slurm.nodes(os.environ["SLURM_STEP_NODELIST"])[0]
        port = 20_000 + int(os.environ["SLURM_JOB_ID"]) * 7 % 10_000 + int(os.environ["SLURM_STEP_ID"]) % 7
        return slurm.address(first), str(port)
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, IndexError) as error:
        raise MeshError(
            f"SLURM does not say where the ranks meet ({error}): set MASTER_ADDR and MASTER_PORT, or use `longctx "
            "train` with launch.launcher: slurm"
        ) from None


# Groups are never destroyed, and each costs threads and sockets: equal grids share theirs.
_made: dict[tuple[int, int, int], tuple[dist.ProcessGroup, dict[str, dist.ProcessGroup]]] = {}


def make_groups(
    grid: tuple[int, int, int], partitions: dict[str, list[list[int]]], rank: int
) -> dict[str, dist.ProcessGroup]:
    """Return this rank's process groups by name, with "world" and "self"; created on first use, by all ranks in the
    same order as torch requires. Groups of one rank or of the whole world are shared; only the ring always has a
    communicator of its own.

    Args:
        grid: (data, ring, ulysses).
        partitions: the members of all ranks' groups, by name.
    """
    world = dist.group.WORLD
    assert world is not None
    if grid in _made and _made[grid][0] is world:
        return _made[grid][1]
    groups: dict[str, dist.ProcessGroup] = {"world": world, "self": _alone(world, rank)}
    for name, members in partitions.items():
        if len(members[0]) == 1:
            groups[name] = groups["self"]
        elif len(members) == 1 and name != "ring":
            groups[name] = world
        else:
            groups[name] = _split(members, rank)
    _made[grid] = (world, groups)
    return groups


_neighbours: dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}


def neighbours(size: int) -> dist.ProcessGroup:
    """Return this rank's group of ``size`` adjacent ranks, as those of one host are; ``size`` divides the world size.
    Collective over the world on first use."""
    world = dist.group.WORLD
    assert world is not None
    if size not in _neighbours or _neighbours[size][0] is not world:
        members = [list(range(first, first + size)) for first in range(0, world.size(), size)]
        _neighbours[size] = (world, _split(members, world.rank()))
    return _neighbours[size][1]


def _alone(world: dist.ProcessGroup, rank: int) -> dist.ProcessGroup:
    """Return this rank's group of one, that of another grid of the same world if there is one."""
    for owner, groups in _made.values():
        if owner is world:
            return groups["self"]
    return _split([[one] for one in range(world.size())], rank)


def _split(members: list[list[int]], rank: int) -> dist.ProcessGroup:
    """Create one group per list of ``members``, and return the one that ``rank`` belongs to."""
    mine = None
    for ranks in members:
        group = dist.new_group(ranks)
        if rank in ranks:
            mine = group
    assert mine is not None
    return mine
