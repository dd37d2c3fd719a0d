"""Count the bytes and messages that one rank sends for one layer: ring blocks, all-to-alls of heads, bounded states.

Integers only, computed from what decides the traffic in training: the ring's schedule (`attention/schedule.py`), the
heads of each Ulysses member (`attention/heads.py`) and the scan of states (`bounded/ranks/scan.py`). The formulas are
in docs/methods/ring.md "Traffic" and docs/hybrid.md; tests/rehearse/test_step.py compares them with what the code
sends.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from longctx.attention.band import make_rule
from longctx.attention.heads import Share, assign_heads
from longctx.attention.schedule import make_schedule

IDS = 4  # bytes per document id
_ALIGNMENT = 16  # bytes: each tensor of an all-to-all message starts at a multiple
GATHER_RING, GATHER_BYTES = 8, 64 << 20  # bounded/ranks/scan.py: up to these, each state is sent to all that need it
_LARGEST = 256  # ranks; in larger rings blocks of a windowed layer count as travelling the whole ring


class Sent(NamedTuple):
    """Bytes and messages that one rank sends."""

    bytes: int
    messages: int


class Hops(NamedTuple):
    """Key/value blocks, and dK/dV blocks, that one rank sends in one pass."""

    kv: int
    gradients: int


@dataclass(frozen=True)
class Layer:
    """One layer's attention over causal rows of `tokens` tokens; rank = ring index × ulysses + ulysses index."""

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
    """Whether document ids are sent with the keys, as in training."""
    rows: int = 1
    member: int | None = None
    """The Ulysses member whose ring is counted; None: the one with the most key heads."""

    @property
    def world(self) -> int:
        return self.ring * self.ulysses

    @property
    def local(self) -> int:
        return self.tokens // self.world

    @property
    def block(self) -> int:
        """Tokens per ring block. Each Ulysses member has all of them, for its own heads."""
        return self.tokens // self.ring

    @property
    def shares(self) -> tuple[Share, ...]:
        """The heads of each Ulysses member."""
        return assign_heads(self.heads, self.kv_heads, self.ulysses)

    @property
    def chosen_member(self) -> int:
        """The Ulysses member that is counted."""
        if self.member is not None:
            return self.member
        return max(range(self.ulysses), key=lambda member: carried_heads(self.shares[member]))

    @property
    def ids_bytes(self) -> int:
        """Bytes of one block's document ids."""
        return IDS * self.rows * self.block if self.documents else 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of one message of keys and values."""
        return self._kv_elements * self.itemsize + self.ids_bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one message of dK and dV."""
        return self._kv_elements * self.gradient_itemsize

    @property
    def _kv_elements(self) -> int:
        return 2 * self.rows * self.block * carried_heads(self.shares[self.chosen_member]) * self.head_dim

    def flops(self, backward: bool) -> float:
        """Return the useful FLOPs of one pass over causal pairs: two matrix products forward, five backward."""
        return (10.0 if backward else 4.0) * self.heads * self.head_dim * self.tokens * (self.tokens + 1) / 2


def carried_heads(share: Share) -> int:
    """Count the key heads of one member's ring: its own, with copies where they serve unequal numbers of query
    heads."""
    return share.key_count if share.expand is None else len(share.expand)


def ring_sent(layer: Layer, *, backward: bool, rank: int | None = None) -> Sent:
    """Count what a ring rank sends in one pass (None: the busiest)."""
    hops = hops_of(layer.layout, layer.ring, layer.block, layer.window, rank)
    gradients = hops.gradients if backward else 0
    # A rank sends its own block as separate messages, k, v and ids; blocks of other ranks it passes on as one message.
    extra = min(hops.kv, 1) * (1 + layer.documents)
    if layer.window is not None and layer.layout == "zigzag" and rank is not None:
        extra *= _chains(layer, rank)
    return Sent(hops.kv * layer.kv_bytes + gradients * layer.gradient_bytes, hops.kv + extra + gradients)


def hops_of(layout: str, ring: int, block: int, window: int | None, rank: int | None = None) -> Hops:
    """Count the blocks of `block` tokens that a rank of a causal ring sends in one pass (None: the most of any
    rank)."""
    if ring == 1:
        return Hops(0, 0)
    # Ring positions that a contiguous block travels until no rank's queries see it.
    reach = ring - 1 if window is None else min(ring - 1, -(-(window - 1) // block))
    if layout == "contiguous":
        if rank is None:
            return Hops(reach, reach)
        return Hops(min(reach, rank + 1) if rank < ring - 1 else 0, min(reach, rank))
    if window is None or window >= ring * block:
        return Hops(ring - 1, ring)
    if rank is None and layout == "zigzag":  # in a larger ring a rank has as many hops
        ring = min(ring, 8 * reach + 8)
    if ring > _LARGEST and rank is None:  # an upper bound: every block travels the whole ring
        return Hops(ring - 1, ring)
    return _windowed(layout, ring, block, window, rank)


@lru_cache(maxsize=256)
def _windowed(layout: str, ring: int, block: int, window: int, rank: int | None) -> Hops:
    """Count the hops of a windowed layer from its schedule."""
    schedule = make_schedule(layout, ring, ring * block, make_rule(True, window))
    found = [schedule.stages(each) for each in (range(ring) if rank is None else [rank])]
    return Hops(
        max(sum(stage.kv_to is not None for stage in stages) for stages in found),
        max(sum(stage.grad_to is not None for stage in stages) for stages in found),
    )


def _chains(layer: Layer, rank: int) -> int:
    """Count the directions in which a rank sends its own block."""
    schedule = make_schedule(layer.layout, layer.ring, layer.tokens, make_rule(True, layer.window))
    stages = schedule.stages(rank)
    return sum(stage.chain_begins and stage.kv_to is not None for stage in stages)


def all_to_all_sent(layer: Layer, *, backward: bool, lean: bool = False) -> Sent:
    """Count what a Ulysses member sends in one pass: two all-to-alls, before and after attention.

    Args:
        lean: backward's all-to-all carries q, k, v and out again (`recompute: layer_keep_attention`).
    """
    size, own = layer.ulysses, layer.shares[layer.chosen_member]
    others = [share for member, share in enumerate(layer.shares) if member != layer.chosen_member]

    def piece(width: int, itemsize: int = layer.itemsize) -> int:  # one member's part of a tensor, padded
        return -(-layer.rows * layer.local * width * itemsize // _ALIGNMENT) * _ALIGNMENT

    def inputs(share: Share) -> int:  # q, k, v and ids
        ids = piece(1, IDS) if layer.documents else 0
        return piece(share.query_count * layer.head_dim) + 2 * piece(share.key_count * layer.head_dim) + ids

    # Forward sends q, k, v of the other members' heads, and back the output of its own heads for their tokens. Backward
    # sends dout of their heads, and back dq, dk, dv of its own.
    queries, keys = piece(own.query_count * layer.head_dim), piece(own.key_count * layer.head_dim)
    if not backward:
        return Sent(sum(map(inputs, others)) + (size - 1) * queries, 2 * (size - 1))
    results = sum(piece(share.query_count * layer.head_dim) for share in others)
    again = sum(map(inputs, others)) + results if lean else 0
    return Sent(results + again + (size - 1) * (queries + 2 * keys), 2 * (size - 1))


def scan_sent(layout: str, ring: int, state: int, *, backward: bool, rank: int | None = None) -> Sent:
    """Count what a rank sends so that every chunk of the row gets the states of all earlier chunks (None: the busiest).

    Args:
        state: bytes of one chunk's state. In zigzag a rank has two chunks.
    """
    if rank is None:
        return max(scan_sent(layout, ring, state, backward=backward, rank=each) for each in range(ring))
    zigzag, before, after = layout == "zigzag", rank, ring - 1 - rank
    if ring <= GATHER_RING or ring * state * (1 + zigzag) <= GATHER_BYTES:
        # Forward: all ranks need a zigzag rank's first chunk, the ranks before it also its second, which is earlier
        # than theirs. Backward sends gradients along the reversed routes.
        if zigzag:
            return Sent((ring - 1 + (after if backward else before)) * state, ring - 1)
        messages = before if backward else after
        return Sent(messages * state, messages)
    # Large rings and states: one Hillis-Steele scan per chunk, in opposite directions.
    ups, downs = (_steps(distance) for distance in ((before, after) if backward else (after, before)))
    messages = ups + downs if zigzag else ups
    return Sent(messages * state, messages)


def _steps(distance: int) -> int:
    """Count the messages of a Hillis-Steele scan: to ranks at distance 1, 2, 4, …, and a final shift by one."""
    return distance.bit_length() + (distance > 0)
