"""Choose the Ulysses group size: the rule behind `mesh.ulysses: auto`. Arithmetic only.

All-to-alls send fewer bytes than a ring but do not overlap with compute, so they belong on fast links: within a host.
On a single host a ring is nearly as fast, and a group larger than the number of key/value heads would send and store
copies of them, so key/value heads set the limit. Over several hosts the ring's blocks cross the network, which costs
far more than copies of a few heads within a host, so query heads set the limit. `longctx plan` agrees within 5 %
(tests/plan/test_auto.py).
"""

from __future__ import annotations

from typing import NamedTuple


class UlyssesLimits(NamedTuple):
    """Upper bounds of the Ulysses group size."""

    kv_heads: int | None
    """Key/value heads of the model; None: unknown, or a layer does not support Ulysses."""
    per_host: int | None
    """Ranks per host; None: unknown."""
    heads: int | None = None
    """Query heads; None: as many as key/value heads."""


UNKNOWN_LIMITS = UlyssesLimits(None, None)


def choose_ulysses(ranks: int, limits: UlyssesLimits) -> int:
    """Return the largest size that divides ``ranks``, the ranks per host and the key/value heads (the query heads if
    ``ranks`` span several hosts); 1 if one of them is unknown."""
    if limits.kv_heads is None or limits.per_host is None:
        return 1
    heads = limits.kv_heads if ranks <= limits.per_host else limits.heads or limits.kv_heads
    fits = (n for n in range(heads, 0, -1) if not (heads % n or ranks % n or limits.per_host % n))
    return next(fits, 1)
