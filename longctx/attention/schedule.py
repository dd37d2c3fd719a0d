"""Which rank meets which block at which step, and what it sends meanwhile. Pure integers: no torch, no data.

Every rank derives the whole schedule from the configuration (layout, ring, length, causal, window), never from its
documents or inputs, so all ranks enter the same exchanges. A block of keys and values starts at its home and is handed
from neighbour to neighbour: along a *chain* forwards and, where a window reaches both neighbours (zigzag), along a
second chain backwards. It goes only as far as somebody down the chain needs it. In the backward pass its gradient
follows one step behind, and the last rank of the chain sends it home in one message.

A full ring: K/V make R - 1 hops; dK/dV start from home with the home's own part and make R.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from longctx.attention.band import Rule, band, trim, visible
from longctx.layout import Span, get_layout


@dataclass(frozen=True)
class Stage:
    """What one rank does in one stage; peers are ring ranks, None: nothing to do.

    Stage 0 is the rank's own block. While a stage computes, the next stage's block arrives (kv_from) and the gradient
    of the previous stage's block leaves (grad_to). The last stage holds no block: it only lets gradients come home.
    """

    source: int | None = None
    """Whose block is here (None: no block)."""
    compute: bool = False
    """Whether this rank's queries see any of it (a block may only pass through)."""
    kv_to: int | None = None
    chain_begins: bool = False
    """Blocks set out from home in this stage: kv_to gets this rank's own, not the one it is computing with."""
    kv_from: int | None = None
    """Who sends the next stage's block."""
    grad_to: int | None = None
    """Who gets the gradient accumulated in the previous stage: the next rank of the chain, or the block's home."""
    grad_home: bool = False
    """grad_to is the block's home: the gradient is complete."""
    grad_stays: bool = False
    """The block here is this rank's own, and this rank's part of its gradient does not travel."""
    grad_from: int | None = None
    """Who sends what earlier ranks have accumulated for the block that is here."""
    home_from: int | None = None
    """Who sends the finished gradient of this rank's own block."""


@dataclass(frozen=True)
class Chain:
    """Blocks move by `direction` (+1 or -1), block s for reach[s] hops."""

    direction: int
    reach: tuple[int, ...]
    carries_home: bool
    """The gradient leaves home with the home's own part (a closed ring: it must come round anyway)."""


@dataclass(frozen=True, eq=False)  # compared and cached by identity: a large ring's table takes long to hash
class Schedule:
    """The whole ring's plan; `stages(rank)` is one rank's."""

    ring: int
    needed: tuple[tuple[bool, ...], ...]
    """needed[rank][source]: some query of the rank sees some key of the source."""
    chains: tuple[Chain, ...]

    def stages(self, rank: int) -> tuple[Stage, ...]:
        """The stages of one rank; all ranks have equally many."""
        return _stages(self, rank)

    @property
    def hops(self) -> int:
        """K/V messages of the whole ring in one pass."""
        return sum(sum(chain.reach) for chain in self.chains)

    @property
    def gradient_hops(self) -> int:
        """dK/dV messages of the whole ring in one backward pass."""
        return sum(hops + chain.carries_home for chain in self.chains for hops in chain.reach if hops)


@lru_cache(maxsize=256)
def make_schedule(layout: str, ring: int, length: int, rule: Rule) -> Schedule:
    """The schedule for `length` tokens (padded) over `ring` ranks."""
    blocks = [get_layout(layout).spans(rank, ring, length) for rank in range(ring)]
    needed = _needed(blocks, rule)
    forward, backward = zip(*(_split(needed, source) for source in range(ring)), strict=True)
    chains = []
    for direction, reach in ((1, forward), (-1, backward)):
        if any(reach):
            chains.append(Chain(direction, reach, all(hops == ring - 1 for hops in reach)))
    return Schedule(ring, needed, tuple(chains))


def work(layout: str, ring: int, length: int, rule: Rule) -> list[list[int]]:
    """work[rank][source]: visible (query, key) pairs, exactly; its row sums say how balanced a layout is."""
    blocks: list[tuple[Span, ...]] = [get_layout(layout).spans(rank, ring, length) for rank in range(ring)]
    return [[visible(q, k, rule) for k in blocks] for q in blocks]


def _needed(blocks: list[tuple[Span, ...]], rule: Rule) -> tuple[tuple[bool, ...], ...]:
    """`sees` of every pair of blocks. Spans differ in little but where they start, so few answers need to be found."""
    met: dict[tuple[int, int, int], bool] = {}

    def meet(q: Span, k: Span) -> bool:
        key = (q.start - k.start, q.count, k.count)
        if key not in met:
            met[key] = band(q, k, rule) is not None
        return met[key]

    trimmed = [tuple(trim(span, rule.length) for span in reversed(block)) for block in blocks]
    return tuple(tuple(any(meet(q, k) for q in mine for k in theirs) for theirs in trimmed) for mine in trimmed)


def _split(needed: tuple[tuple[bool, ...], ...], source: int) -> tuple[int, int]:
    """How far block `source` must go forwards and backwards so that all who need it get it, in the fewest hops."""
    ring = len(needed)
    distances = [d for d in range(1, ring) if needed[(source + d) % ring][source]]
    # cut the needed distances in two: those up to `forward` are served forwards, the rest backwards
    cuts = [
        (distances[i - 1] if i else 0, ring - distances[i] if i < len(distances) else 0)
        for i in range(len(distances) + 1)
    ]
    return min(cuts, key=lambda cut: (cut[0] + cut[1], cut[1]))


@lru_cache(maxsize=256)
def _stages(schedule: Schedule, rank: int) -> tuple[Stage, ...]:
    ring = schedule.ring
    stays = not any(chain.carries_home for chain in schedule.chains)
    slots: list[dict[str, int | bool]] = [{"source": rank, "compute": schedule.needed[rank][rank], "grad_stays": stays}]
    for chain in schedule.chains:
        first = len(slots)  # the chain's hop t is stage first + t - 1
        slots += [{} for _ in range(max(chain.reach))]
        onward, before = (rank + chain.direction) % ring, (rank - chain.direction) % ring
        slots[first - 1]["chain_begins"] = True
        for hop in range(1, max(chain.reach) + 1):
            source, held = (rank - chain.direction * hop) % ring, (rank - chain.direction * (hop - 1)) % ring
            slot = slots[first + hop - 1]
            if chain.reach[held] >= hop:
                slots[first + hop - 2]["kv_to"] = onward
                if hop > 1 or chain.carries_home:
                    slot["grad_to"] = onward
            if chain.reach[source] >= hop:
                slots[first + hop - 2]["kv_from"] = before
                slot.update(source=source, compute=schedule.needed[rank][source])
                if hop > 1 or chain.carries_home:
                    slot["grad_from"] = before
    slots.append({})  # the flush
    first = 1
    for chain in schedule.chains:
        for hop in range(1, max(chain.reach) + 1):
            source = (rank - chain.direction * hop) % ring
            if chain.reach[source] == hop:
                slots[first + hop].update(grad_to=source, grad_home=True)
        if chain.reach[rank]:
            slots[first + chain.reach[rank]]["home_from"] = (rank + chain.direction * chain.reach[rank]) % ring
        first += max(chain.reach)
    return tuple(Stage(**slot) for slot in slots)  # type: ignore[arg-type]
