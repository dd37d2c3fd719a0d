"""How many of the ranks that share a sequence exchange heads: the rule behind `mesh.ulysses: auto`. Arithmetic only.

Exchanging heads moves less than a ring and hides nothing, so it belongs where links are fast: inside a host. Within one
host a ring is nearly as good, and a key/value head is best on one rank: where more ranks exchange than there are such
heads, copies travel and take memory. Over several hosts the ring's blocks cross the network, and copies of a few heads
inside the host are by far the smaller price: query heads decide. `longctx plan` agrees within five per cent
(tests/plan/test_auto.py).
"""

from __future__ import annotations

from typing import NamedTuple


class UlyssesLimits(NamedTuple):
    """What an exchange of heads may take."""

    kv_heads: int | None
    """Key/value heads of the model; None: not known, or no layer can exchange heads."""
    per_host: int | None
    """Ranks on one host; None: not known."""
    heads: int | None = None
    """Query heads; None: as many as key/value heads."""


UNKNOWN_LIMITS = UlyssesLimits(None, None)


def choose_ulysses(ranks: int, room: UlyssesLimits) -> int:
    """Return the largest number of members that divides `ranks`, the ranks of a host and the key/value heads, or the
    query heads where the ranks stand on several hosts; 1 where one of them is not known."""
    if room.kv_heads is None or room.per_host is None:
        return 1
    heads = room.kv_heads if ranks <= room.per_host else room.heads or room.kv_heads
    fits = (n for n in range(heads, 0, -1) if not (heads % n or ranks % n or room.per_host % n))
    return next(fits, 1)
