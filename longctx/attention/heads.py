"""Which heads each rank of a ulysses group computes: integers only, no torch.

Query heads are assigned in order, as evenly as possible. A rank gets the key heads that its query heads read and no
other, so a key head is copied only if the query heads that share it are on several ranks.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple

from longctx.errors import AttentionError


class Share(NamedTuple):
    """One rank's heads, by their numbers in the whole model.

    expand: kernels need key heads that serve equally many query heads each. If this rank's do not, its query heads
        form blocks of equal size, and this is the key head (counted from keys.start) of each block; else None.
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
    """Require at least one query head per rank of a ulysses group.

    Raises:
        AttentionError: a rank would have no query head.
    """
    if members > heads:
        raise AttentionError(
            f"ulysses={members} and {heads} query heads: a rank would have no head; use at most ulysses={heads}, and "
            "ring for the other ranks"
        )


@lru_cache(maxsize=64)
def assign_heads(heads: int, kv_heads: int, members: int) -> tuple[Share, ...]:
    """Return the heads of each rank of a ulysses group of `members` ranks.

    Raises:
        AttentionError: a rank would have no query head.
    """
    check_members(heads, members)
    bounds = [rank * heads // members for rank in range(members + 1)]
    return tuple(_share(first, stop, heads // kv_heads) for first, stop in zip(bounds, bounds[1:], strict=False))


def _share(first: int, stop: int, group: int) -> Share:
    """Return the share with query heads [first, stop), of which each `group` consecutive ones read one key head."""
    keys = range(first // group, (stop - 1) // group + 1)
    runs = [min(stop, (key + 1) * group) - max(first, key * group) for key in keys]
    block = gcd(*runs)  # the largest block size that divides every key head's run of query heads
    expand = tuple(key for key, run in enumerate(runs) for _ in range(run // block))
    return Share(slice(first, stop), slice(keys.start, keys.stop), expand if len(expand) > len(keys) else None)
