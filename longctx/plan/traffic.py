"""What one rank sends for one layer, to the byte and message: blocks on the ring, heads exchanged, states of memories.

Integers only, from what decides them in training: who needs whose block (`attention/schedule.py`), who computes which
heads (`attention/heads.py`), which rank's state is needed where (`bounded/ranks/scan.py`). docs/ring.md and
docs/hybrid.md have the same formulas; tests/plan/test_rehearse.py holds them to what the code really sends.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from longctx.attention.band import make_rule
from longctx.attention.heads import Share, assign_heads
from longctx.attention.schedule import make_schedule

IDS = 4  # bytes of a token's document id
_ALIGNMENT = 16  # bytes: where a part of an exchange's message begins
GATHER_RING, GATHER_BYTES = 8, 64 << 20  # bounded/ranks/scan.py: up to these, states go straight to all who need them
_LARGEST = 256  # ranks of a ring whose windowed schedule is worked out here; in larger ones blocks count as going round


class Sent(NamedTuple):
    """What one rank sends."""

    bytes: int
    messages: int


class Hops(NamedTuple):
    """Blocks of keys and values, and of their gradients, that one rank sends in one pass."""

    kv: int
    gradients: int


@dataclass(frozen=True)
class Layer:
    """One layer's attention over a causal row of `tokens`; rank = ring index x ulysses + ulysses index."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    ring: int = 1
    ulysses: int = 1
    layout: str = "zigzag"
    itemsize: int = 2
    gradient_itemsize: int = 4
    window: int | None = None
    documents: bool = False
    """Ids of documents travel with the keys, as they do in training."""
    rows: int = 1
    member: int | None = None
    """The Ulysses member whose ring is meant; None: the one that carries most."""

    @property
    def world(self) -> int:
        return self.ring * self.ulysses

    @property
    def local(self) -> int:
        return self.tokens // self.world

    @property
    def block(self) -> int:
        """Tokens of a ring member's block: its Ulysses members have all of them, for their own heads."""
        return self.tokens // self.ring

    @property
    def shares(self) -> tuple[Share, ...]:
        """The heads of every Ulysses member."""
        return assign_heads(self.heads, self.kv_heads, self.ulysses)

    @property
    def place(self) -> int:
        """The member that is meant."""
        if self.member is not None:
            return self.member
        return max(range(self.ulysses), key=lambda member: carried(self.shares[member]))

    @property
    def ids_bytes(self) -> int:
        """Document ids of one block."""
        return IDS * self.rows * self.block if self.documents else 0

    @property
    def kv_bytes(self) -> int:
        """One message of keys and values."""
        return self._pair * self.itemsize + self.ids_bytes

    @property
    def gradient_bytes(self) -> int:
        """One message of dK and dV."""
        return self._pair * self.gradient_itemsize

    @property
    def _pair(self) -> int:
        return 2 * self.rows * self.block * carried(self.shares[self.place]) * self.head_dim

    def flops(self, backward: bool) -> float:
        """Useful FLOPs of one pass: causal pairs, two products forward and five backward."""
        return (10.0 if backward else 4.0) * self.heads * self.head_dim * self.tokens * (self.tokens + 1) / 2


def carried(share: Share) -> int:
    """Key heads that a member's ring carries: its own, copied where they serve unequal numbers of query heads."""
    return share.key_count if share.expand is None else len(share.expand)


def ring_sent(layer: Layer, *, backward: bool, rank: int | None = None) -> Sent:
    """What a ring rank sends around in one pass (None: the busiest). A block leaves home as k and v (and ids)."""
    hops = hops_of(layer.layout, layer.ring, layer.block, layer.window, rank)
    gradients = hops.gradients if backward else 0
    setting_out = min(hops.kv, 1) * (1 + layer.documents)
    if layer.window is not None and layer.layout == "zigzag" and rank is not None:
        setting_out *= _chains(layer, rank)
    return Sent(hops.kv * layer.kv_bytes + gradients * layer.gradient_bytes, hops.kv + setting_out + gradients)


def hops_of(layout: str, ring: int, block: int, window: int | None, rank: int | None = None) -> Hops:
    """Blocks of `block` tokens that a rank of a causal ring sends in a pass (None: as many as any rank sends)."""
    if ring == 1:
        return Hops(0, 0)
    reach = ring - 1 if window is None else min(ring - 1, -(-(window - 1) // block))
    if layout == "contiguous":
        if rank is None:
            return Hops(reach, reach)
        return Hops(min(reach, rank + 1) if rank < ring - 1 else 0, min(reach, rank))
    if window is None or window >= ring * block:
        return Hops(ring - 1, ring)
    if rank is None and layout == "zigzag":  # who is near whom does not depend on the ring's size
        ring = min(ring, 8 * reach + 8)
    if ring > _LARGEST and rank is None:
        return Hops(ring - 1, ring)
    return _windowed(layout, ring, block, window, rank)


@lru_cache(maxsize=256)
def _windowed(layout: str, ring: int, block: int, window: int, rank: int | None) -> Hops:
    schedule = make_schedule(layout, ring, ring * block, make_rule(True, window))
    found = [schedule.stages(each) for each in (range(ring) if rank is None else [rank])]
    return Hops(
        max(sum(stage.kv_to is not None for stage in stages) for stages in found),
        max(sum(stage.grad_to is not None for stage in stages) for stages in found),
    )


def _chains(layer: Layer, rank: int) -> int:
    """Times that a rank's own block sets out: once a direction."""
    schedule = make_schedule(layer.layout, layer.ring, layer.tokens, make_rule(True, layer.window))
    stages = schedule.stages(rank)
    return sum(stage.chain_begins and stage.kv_to is not None for stage in stages)


def exchange_sent(layer: Layer, *, backward: bool, lean: bool = False) -> Sent:
    """What a Ulysses member sends in one pass to exchange heads for tokens, and back.

    Args:
        lean: backward gets q, k, v and out by message again (`recompute: layer_keep_attention`).
    """
    size, own = layer.ulysses, layer.shares[layer.place]
    others = [share for member, share in enumerate(layer.shares) if member != layer.place]

    def piece(numbers: int, itemsize: int = layer.itemsize) -> int:
        return -(-layer.rows * layer.local * numbers * itemsize // _ALIGNMENT) * _ALIGNMENT

    def inputs(share: Share) -> int:  # q, k, v and ids
        ids = piece(1, IDS) if layer.documents else 0
        return piece(share.query_count * layer.head_dim) + 2 * piece(share.key_count * layer.head_dim) + ids

    queries, keys = piece(own.query_count * layer.head_dim), piece(own.key_count * layer.head_dim)
    if not backward:
        return Sent(sum(map(inputs, others)) + (size - 1) * queries, 2 * (size - 1))
    results = sum(piece(share.query_count * layer.head_dim) for share in others)
    again = sum(map(inputs, others)) + results if lean else 0
    return Sent(results + again + (size - 1) * (queries + 2 * keys), 2 * (size - 1))


def scan_sent(layout: str, ring: int, state: int, *, backward: bool, rank: int | None = None) -> Sent:
    """What a rank sends so that every chunk of the row gets the states of all before it (None: the busiest rank).

    Args:
        state: bytes of one chunk's; a rank has two chunks in zigzag.
    """
    if rank is None:
        return max(scan_sent(layout, ring, state, backward=backward, rank=each) for each in range(ring))
    zigzag, before, after = layout == "zigzag", rank, ring - 1 - rank
    if ring <= GATHER_RING or ring * state * (1 + zigzag) <= GATHER_BYTES:
        if zigzag:  # the first chunk is needed by all, the second by those whose second chunk comes later
            return Sent((ring - 1 + (after if backward else before)) * state, ring - 1)
        messages = before if backward else after
        return Sent(messages * state, messages)
    ups, downs = (_steps(distance) for distance in ((before, after) if backward else (after, before)))
    messages = ups + downs if zigzag else ups
    return Sent(messages * state, messages)


def _steps(distance: int) -> int:
    """Messages of a Hillis-Steele leg to ranks that are 1, 2, 4, ... places on, and the last shift by one."""
    return distance.bit_length() + (distance > 0)
