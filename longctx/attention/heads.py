"""Which heads each member of an exchange computes: pure integers, no torch.

Query heads are dealt out in order, as evenly as they go. A member gets the key heads that its query heads read and no
other, so a key head is copied only where the query heads that share it are on several members.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple

from longctx.errors import AttentionError


class Share(NamedTuple):
    """One member's heads, by their numbers in the whole model.

    expand: where key heads serve unequal numbers of this member's query heads, the key head (counted from keys.start)
        of each of the equal blocks that its query heads fall into; None where they are equal anyway.
    """

    queries: slice
    keys: slice
    expand: tuple[int, ...] | None

    @property
    def query_count(self) -> int:
        return int(self.queries.stop - self.queries.start)

    @property
    def key_count(self) -> int:
        return int(self.keys.stop - self.keys.start)


def check_members(heads: int, members: int) -> None:
    """Refuse an exchange among more members than heads.

    Raises:
        AttentionError: a member would have no query head.
    """
    if members > heads:
        raise AttentionError(
            f"ulysses={members} and {heads} query heads: a rank would have no head; use at most ulysses={heads}, and "
            "ring for the other ranks"
        )


@lru_cache(maxsize=64)
def deal(heads: int, kv_heads: int, members: int) -> tuple[Share, ...]:
    """The share of every member.

    Raises:
        AttentionError: a member would have no query head.
    """
    check_members(heads, members)
    bounds = [member * heads // members for member in range(members + 1)]
    return tuple(_share(first, stop, heads // kv_heads) for first, stop in zip(bounds, bounds[1:], strict=False))


def _share(first: int, stop: int, group: int) -> Share:
    """Query heads first to stop, of which `group` in a row read one key head."""
    keys = range(first // group, (stop - 1) // group + 1)
    runs = [min(stop, (key + 1) * group) - max(first, key * group) for key in keys]
    block = gcd(*runs)
    expand = tuple(place for place, run in enumerate(runs) for _ in range(run // block))
    return Share(slice(first, stop), slice(keys.start, keys.stop), expand if len(expand) > len(keys) else None)
