"""Which rank runs on which host, and its coordinates in the mesh. Pure arithmetic.

Ranks fill the hosts in order. rank = (data_index · ring + ring_index) · ulysses + ulysses_index, so a Ulysses group
lies within a host where it fits, and ring neighbours are on the same or adjacent hosts. Exceptions are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from longctx.errors import LaunchError
from longctx.mesh import Mesh


class RankPlace(NamedTuple):
    """One rank's host and mesh coordinates."""

    rank: int
    host: str
    local_rank: int
    data: int
    ring: int
    ulysses: int


class Placement(NamedTuple):
    """Which host runs which rank."""

    places: tuple[RankPlace, ...]
    hosts: tuple[tuple[str, int], ...]
    """(name, ranks) of the hosts in use, in order"""
    split_ulysses: int
    """Ulysses groups that span more than one host"""
    hops_between_hosts: int
    """messages per step of all rings that cross between hosts"""

    def on(self, host: str) -> tuple[RankPlace, ...]:
        """Return the ranks of one host."""
        return tuple(place for place in self.places if place.host == host)


def place_ranks(hosts: Sequence[tuple[str, int]], ring: int, ulysses: int, data: int) -> Placement:
    """Place ``ring · ulysses · data`` ranks on ``hosts``, given as (name, slots).

    Raises:
        LaunchError: the hosts have too few slots.
    """
    world, total = ring * ulysses * data, sum(room for _, room in hosts)
    if total < world:
        raise LaunchError(
            f"the mesh (data {data} x ring {ring} x ulysses {ulysses}) has {world} ranks, but the hosts take {total}: "
            + ", ".join(f"{name} {room}" for name, room in hosts[:8])
            + (", …" if len(hosts) > 8 else "")
            + "; add hosts, raise launch.ranks_per_host, or lower mesh.data"
        )
    seats = [(name, local) for name, room in hosts for local in range(room)][:world]
    mesh = Mesh(ring, ulysses, data, world_size=world, rank=0)
    cells = {mesh.rank_at(*cell): cell for cell in product(range(data), range(ring), range(ulysses))}
    places = [RankPlace(rank, name, local, *cells[rank]) for rank, (name, local) in enumerate(seats)]
    used: dict[str, int] = {}
    for name, _ in seats:
        used[name] = used.get(name, 0) + 1
    return Placement(tuple(places), tuple(used.items()), *_crossings(places, ring, ulysses))


def _crossings(places: Sequence[RankPlace], ring: int, ulysses: int) -> tuple[int, int]:
    """Return (Ulysses groups that span hosts, ring hops between hosts)."""
    at = {(item.data, item.ring, item.ulysses): item.host for item in places}
    groups: dict[tuple[int, int], set[str]] = {}
    for item in places:
        groups.setdefault((item.data, item.ring), set()).add(item.host)
    hops = sum(at[d, r, u] != at[d, (r + 1) % ring, u] for d, r, u in at)
    return sum(len(group) > 1 for group in groups.values()), hops


def table(placement: Placement) -> list[str]:
    """Return the placement as lines of text: one row per rank, then the traffic between hosts."""
    width = max(len("host"), *(len(name) for name, _ in placement.hosts))
    lines = [f"  {'rank':>5}  {'host':<{width}}  {'local':>5}  {'data':>5}  {'ring':>5}  {'ulysses':>7}"]
    lines += [
        f"  {item.rank:>5}  {item.host:<{width}}  {item.local_rank:>5}  {item.data:>5}  {item.ring:>5}  "
        f"{item.ulysses:>7}"
        for item in placement.places
    ]
    hops = placement.hops_between_hosts
    lines.append(f"  {hops} of {len(placement.places)} ring hops cross between hosts")
    if placement.split_ulysses:
        lines.append(
            f"  warning: {placement.split_ulysses} Ulysses groups span several hosts; make the ranks per host a "
            "multiple of mesh.ulysses"
        )
    return lines
