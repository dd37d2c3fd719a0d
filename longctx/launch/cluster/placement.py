"""Which rank runs on which host, and what it is in the mesh. Pure arithmetic.

Ranks fill host after host. Since rank = ((data · ring) + ring_index) · ulysses + ulysses_index, ulysses members come to
stand inside a host and ring neighbours beside each other; what does not is counted, and said.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from longctx.errors import LaunchError
from longctx.mesh import Mesh


class RankPlace(NamedTuple):
    """Where one rank is."""

    rank: int
    host: str
    local_rank: int
    data: int
    ring: int
    ulysses: int


class Placement(NamedTuple):
    """Where all ranks are."""

    places: tuple[RankPlace, ...]
    hosts: tuple[tuple[str, int], ...]
    """(name, ranks there) of the hosts that have any, in order"""
    split_ulysses: int
    """ulysses groups that reach over more than one host"""
    hops_between_hosts: int
    """of the messages of one step of every ring, those that leave a host"""

    def on(self, host: str) -> tuple[RankPlace, ...]:
        """Return the ranks of one host."""
        return tuple(place for place in self.places if place.host == host)


def place(hosts: Sequence[tuple[str, int]], ring: int, ulysses: int, data: int) -> Placement:
    """Put ``ring · ulysses · data`` ranks on ``hosts``, given as (name, room).

    Raises:
        LaunchError: there is not room for so many.
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
    """Return (ulysses groups on several hosts, hops of all rings between hosts)."""
    at = {(item.data, item.ring, item.ulysses): item.host for item in places}
    groups: dict[tuple[int, int], set[str]] = {}
    for item in places:
        groups.setdefault((item.data, item.ring), set()).add(item.host)
    hops = sum(at[d, r, u] != at[d, (r + 1) % ring, u] for d, r, u in at)
    return sum(len(group) > 1 for group in groups.values()), hops


def table(placement: Placement) -> list[str]:
    """Return the placement as lines of text: a row a rank, and what crosses between hosts."""
    width = max(len("host"), *(len(name) for name, _ in placement.hosts))
    lines = [f"  {'rank':>5}  {'host':<{width}}  {'local':>5}  {'data':>5}  {'ring':>5}  {'ulysses':>7}"]
    lines += [
        f"  {item.rank:>5}  {item.host:<{width}}  {item.local_rank:>5}  {item.data:>5}  {item.ring:>5}  "
        f"{item.ulysses:>7}"
        for item in placement.places
    ]
    hops = placement.hops_between_hosts
    lines.append(f"  {hops} of {len(placement.places)} hops of the rings go between hosts")
    if placement.split_ulysses:
        lines.append(
            f"  warning: {placement.split_ulysses} ulysses groups reach over several hosts; ranks on a host should be "
            "a multiple of mesh.ulysses"
        )
    return lines
