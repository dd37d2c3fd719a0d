"""Placement of ranks on hosts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import LaunchError
from longctx.launch.cluster.placement import place_ranks, table


def test_placement() -> None:
    found = place_ranks([("a", 4), ("b", 4)], ring=4, ulysses=2, data=1)
    assert [tuple(item) for item in found.places][3:5] == [(3, "a", 3, 0, 1, 1), (4, "b", 0, 0, 2, 0)]
    assert found.hosts == (("a", 4), ("b", 4)) and found.split_ulysses == 0
    assert found.hops_between_hosts == 4  # out and back, for each of the two rings
    assert place_ranks([("a", 2), ("b", 2)], 2, 1, 2).hops_between_hosts == 0
    odd = place_ranks([("a", 3), ("b", 3)], 3, 2, 1)
    assert odd.split_ulysses == 1 and "warning: 1 Ulysses groups" in table(odd)[-1]
    assert place_ranks([("a", 8), ("b", 8)], 4, 1, 1).hosts == (("a", 4),)
    with pytest.raises(LaunchError, match="has 8 ranks, but the hosts take 6: a 3, b 3"):
        place_ranks([("a", 3), ("b", 3)], 4, 2, 1)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_every_rank_has_one_place(rooms: list[int], ring: int, ulysses: int, data: int) -> None:
    hosts = [(f"h{number}", room) for number, room in enumerate(rooms)]
    if sum(rooms) < ring * ulysses * data:
        return
    found = place_ranks(hosts, ring, ulysses, data)
    assert [item.rank for item in found.places] == list(range(ring * ulysses * data))
    assert all(item.rank == (item.data * ring + item.ring) * ulysses + item.ulysses for item in found.places)
    for name, count in found.hosts:
        assert [item.local_rank for item in found.on(name)] == list(range(count)) and count <= dict(hosts)[name]
