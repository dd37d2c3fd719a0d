"""shard gives each rank its tokens and padding; unshard inverts it, with each rank's own gradient."""

from __future__ import annotations

import pytest
import torch

from longctx.errors import LayoutError
from longctx.mesh import Mesh
from longctx.sharding import cut, local_spans, positions, shard, unshard

from distributed import run_ranks


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


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_the_shards_of_all_ranks_are_the_padded_sequence(layout: str) -> None:
    x = torch.arange(10)[None]
    meshes = [Mesh(ring=2, ulysses=2, world_size=4, rank=rank) for rank in range(4)]
    places = torch.cat([positions(10, mesh, layout) for mesh in meshes])
    parts = torch.cat([shard(x, mesh, layout=layout, pad_value=-1) for mesh in meshes], 1)[0]
    assert sorted(places.tolist()) == list(range(len(places)))
    assert torch.equal(parts, torch.where(places < 10, places, -1))
    assert sum(span.count for span in local_spans(10, meshes[0], layout)) * 4 == len(places)


def test_labels_are_padded_with_minus_100_and_ids_with_0() -> None:
    mesh = Mesh(ring=2, world_size=2, rank=0)  # zigzag: rank 0 holds the last of four chunks, which is padding
    labels = torch.tensor([[1, -100, 3]])
    assert shard(labels, mesh).tolist() == [[1, -100]]
    assert shard(labels.abs(), mesh).tolist() == [[1, 0]]


def test_only_shard_counts_integers_for_the_comparison() -> None:
    mesh = Mesh(ring=2, world_size=2)
    cut(torch.zeros(1, 4, dtype=torch.int64), mesh)
    shard(torch.zeros(1, 4), mesh)
    assert mesh.cut.count == 0
    shard(torch.zeros(1, 4, dtype=torch.int64), mesh)
    assert mesh.cut.count == 1


def test_dimensions_and_lengths_that_do_not_exist_are_named() -> None:
    mesh = Mesh(world_size=1)
    with pytest.raises(LayoutError, match="name its sequence dimension"):
        shard(torch.zeros(4), mesh)
    with pytest.raises(LayoutError, match="is empty"):
        shard(torch.zeros(1, 0), mesh)
    with pytest.raises(LayoutError, match=r"unshard\(length=9\)"):
        unshard(torch.zeros(1, 4), mesh, length=9)
