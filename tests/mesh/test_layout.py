"""Layouts: every token on exactly one rank, in every grid, whatever the length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import LayoutError
from longctx.layout import get_layout
from longctx.mesh import Mesh
from longctx.sharding import positions, shard, unshard

LAYOUTS = ["contiguous", "zigzag", "striped"]
grids = st.tuples(st.integers(1, 8), st.integers(1, 3))


def members(ring: int, ulysses: int) -> list[Mesh]:
    return [Mesh(ring=ring, ulysses=ulysses, world_size=ring * ulysses, rank=rank) for rank in range(ring * ulysses)]


@given(st.sampled_from(LAYOUTS), grids, st.integers(1, 200))
def test_every_token_lives_on_exactly_one_rank(name: str, grid: tuple[int, int], length: int) -> None:
    parts = [positions(length, mesh, layout=name) for mesh in members(*grid)]
    padded = get_layout(name).padded_length(length, *grid)
    assert len({len(part) for part in parts}) == 1
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(padded))
    assert padded - length < get_layout(name).multiple(*grid)


@given(st.sampled_from(LAYOUTS), grids, st.integers(1, 60), st.integers(0, 2))
def test_shard_takes_the_tokens_that_positions_names(name: str, grid: tuple[int, int], length: int, dim: int) -> None:
    x = torch.arange(1.0, length + 1)
    shape = [2, 3]
    shape.insert(dim, length)
    x = x.reshape([length if i == dim else 1 for i in range(3)]).expand(shape)
    for mesh in members(*grid):
        where = positions(length, mesh, layout=name)
        expected = torch.where(where < length, where + 1.0, torch.tensor(-7.0))
        local = shard(x, mesh, dim=dim, layout=name, pad_value=-7.0)
        assert torch.equal(local.movedim(dim, -1)[0, 0], expected)


def test_zigzag_gives_each_rank_an_early_and_a_late_chunk() -> None:
    parts = [positions(16, mesh).tolist() for mesh in members(4, 1)]
    assert parts == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]


def test_ulysses_members_split_the_ring_members_sequence_in_order() -> None:
    layout = get_layout("zigzag")
    for ring_rank in range(3):
        whole = [i for s in layout.spans(ring_rank, 3, 24) for i in range(s.start, s.last + 1, s.stride)]
        halves = [layout.member_spans(ring_rank, 3, u, 2, 24) for u in range(2)]
        assert [i for half in halves for s in half for i in range(s.start, s.last + 1, s.stride)] == whole


@given(st.sampled_from(LAYOUTS), st.integers(2, 12))
def test_shard_is_differentiable(name: str, length: int) -> None:
    x = torch.randn(length, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(40, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for mesh in members(3, 1):
        local = shard(x, mesh, dim=0, layout=name)
        total = total + (local * weights[positions(length, mesh, layout=name)]).sum()
    total.backward()
    assert x.grad is not None and torch.allclose(x.grad, weights[:length])


def test_one_rank_round_trip_trims_the_padding() -> None:
    x = torch.randn(2, 7)
    mesh = Mesh()
    assert torch.equal(unshard(shard(x, mesh), mesh, length=7), x)


def test_bad_requests_name_what_to_change() -> None:
    mesh = Mesh()
    with pytest.raises(LayoutError, match="'zigzg' is unknown; use one of 'contiguous', 'zigzag', 'striped'"):
        positions(4, mesh, layout="zigzg")
    with pytest.raises(LayoutError, match="at least one token"):
        shard(torch.empty(2, 0), mesh)
    with pytest.raises(LayoutError, match=r"shape \(2, 4\)"):
        shard(torch.ones(2, 4), mesh, dim=2)
    with pytest.raises(LayoutError, match="pass the length given to shard"):
        unshard(torch.ones(2, 4), mesh, length=9)


def test_padding_of_labels_is_ignored_by_default() -> None:
    mesh = Mesh(ring=2, world_size=2, rank=0)  # of a zigzag, rank 0 holds the end
    labels, ids = torch.tensor([[4, -100, 6, 7, 8]]), torch.tensor([[4, 5, 6, 7, 8]])
    assert shard(labels, mesh)[0, -1] == -100 and shard(ids, mesh)[0, -1] == 0
    assert shard(labels, mesh, pad_value=3)[0, -1] == 3 and shard(labels.float(), mesh)[0, -1] == 0
