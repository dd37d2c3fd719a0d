"""Mesh: grid arithmetic, its groups on real ranks, and what DeepSpeed asks of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import MeshError
from longctx.mesh import Mesh, from_key
from longctx.sharding import shard, unshard

from distributed import run_ranks


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_rank_formula(ring: int, ulysses: int, data: int) -> None:
    world = ring * ulysses * data
    for rank in range(world):
        mesh = Mesh(ring=ring, ulysses=ulysses, world_size=world, rank=rank)
        assert mesh.data_size == data
        assert rank == (mesh.data_rank * ring + mesh.ring_rank) * ulysses + mesh.ulysses_rank
        assert mesh.ring_ranks[mesh.ring_rank] == mesh.ulysses_ranks[mesh.ulysses_rank] == rank
        assert mesh.data_ranks[mesh.data_rank] == mesh.sequence_ranks[mesh.sequence_rank] == rank
        assert from_key(mesh.key) is mesh


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ring": 3, "world_size": 4}, "choose ring x ulysses that divides 4"),
        ({"ring": 2, "data": 3, "world_size": 4}, "grid of 6 ranks, but the world has 4"),
        ({"ring": 0}, "ring=0.*positive integers"),
        ({"ring": True}, "positive integers"),
        ({"rank": 4, "world_size": 4}, "outside a world"),
    ],
)
def test_impossible_grids_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MeshError, match=message):
        Mesh(**arguments)


def test_world_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "5")
    mesh = Mesh(ring=4)
    assert (mesh.data_size, mesh.data_rank, mesh.ring_rank) == (2, 1, 1)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(MeshError, match="must be integers"):
        Mesh()


def connected(rank: int, world_size: int, ring: int, ulysses: int) -> dict[str, Any]:
    mesh = Mesh(ring=ring, ulysses=ulysses)
    found = {}
    for name in ("ring", "ulysses", "sequence", "data", "world"):
        total = torch.tensor([2.0**rank])
        dist.all_reduce(total, group=getattr(mesh, f"{name}_group"))
        expected = getattr(mesh, f"{name}_ranks") if name != "world" else tuple(range(world_size))
        found[name] = total.item() == sum(2.0**r for r in expected)
    sequence, alone = mesh.get_sequence_parallel_group(), mesh.get_tensor_model_parallel_group()
    found["mpu"] = (
        mesh.get_sequence_parallel_world_size() == ring * ulysses == dist.get_world_size(sequence)
        and mesh.get_sequence_data_parallel_world_size() == world_size
        and mesh.get_tensor_model_parallel_world_size() == dist.get_world_size(alone) == 1
        and not hasattr(mesh, "get_data_parallel_world_size")
    )
    return found


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (2, 1), (2, 2), (4, 1), (1, 4)])
def test_groups_connect_the_ranks_they_name(ring: int, ulysses: int) -> None:
    assert all(all(found.values()) for found in run_ranks(4, connected, ring, ulysses))


def round_trip(rank: int, world_size: int, layout: str, ulysses: int) -> None:
    mesh = Mesh(ring=world_size // ulysses, ulysses=ulysses)
    for length in (1, 5, 16, 17):
        x = torch.arange(2.0 * length * 3, dtype=torch.float64).reshape(2, length, 3)
        local = shard(x, mesh, layout=layout).requires_grad_()
        whole = unshard(local, mesh, length=length, layout=layout)
        assert torch.equal(whole, x)
        weights = torch.cos(x)
        (whole * weights).sum().backward()
        assert local.grad is not None and torch.equal(local.grad, shard(weights, mesh, layout=layout))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("ulysses", [1, 2])
def test_unshard_inverts_shard_and_returns_each_rank_its_own_gradient(layout: str, ulysses: int) -> None:
    run_ranks(4, round_trip, layout, ulysses)


def wrong_world(rank: int, world_size: int) -> str:
    with pytest.raises(MeshError) as error:
        Mesh(ring=2, world_size=8, rank=rank).connect()
    return str(error.value)


def test_a_mesh_of_another_world_is_refused() -> None:
    assert "torch.distributed runs 2" in run_ranks(2, wrong_world)[0]
