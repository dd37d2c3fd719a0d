"""The ring's schedule: which block each rank computes with in each stage, and what it sends and receives meanwhile.

Integers only: no torch, no data. Every rank derives the whole schedule from the layout, ring size, length, causality
and window, never from documents or inputs, so all ranks post the same messages.

Terms. A *stage* is one ring step of one rank; in the last stage only gradients move. A block of keys and values starts
at its *home*, the rank that owns it, and makes *hops*, each to a neighbouring rank. A *chain* is the sequence of hops
in one direction: upwards (to higher ranks) and, if a window reaches both neighbours (zigzag), a second one downwards. A
block's *reach* is the number of its hops in a chain: as far as a rank needs it. In backward its gradient follows one
stage behind; the last rank of the chain sends it home. A chain is *closed* if every block goes all the way round: the
gradient then leaves home with the home's own part (`carries_home`) and makes R hops, K/V R - 1.

Stages of rank 0 in a full ring of R = 3. B is a block, dB its gradient; the index is its home:

    stage | computes with | sends K/V | receives K/V | sends gradient       | receives gradient
    0     | B0            | B0 to 1   | B2 from 2    |                      |
    1     | B2            | B2 to 1   | B1 from 2    | dB0 to 1             | dB2 from 2
    2     | B1            |           |              | dB2 to 1             | dB1 from 2
    3     |               |           |              | dB1 to 1, its home   | dB0 from 2, finished

With a causal window that reaches the next rank only (contiguous), the chain is not closed, and rank r's part of its own
block's gradient waits at home (`grad_stays`). Stages of rank 1:

    0     | B1            | B1 to 2   | B0 from 0    |                      |
    1     | B0            |           |              |                      |
    2     |               |           |              | dB0 to 0, its home   | dB1 from 2, finished
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from longctx.attention.band import Rule, band, trim, visible
from longctx.layout import Span, get_layout


@dataclass(frozen=True)
class Stage:
    """What one rank does in one stage. Peers are ring ranks; None: no message.

    Stage 0 is the rank's own block. While a stage computes, the next stage's block arrives (kv_from) and the gradient
    of the previous stage's block leaves (grad_to). The last stage has no block: the last gradients arrive at home.
    """

    source: int | None = None
    """The rank whose block this stage computes with (None: no block)."""
    compute: bool = False
    """Whether this rank's queries see any of it; if not, the block only passes through."""
    kv_to: int | None = None
    chain_begins: bool = False
    """kv_to gets this rank's own block, not the one it is computing with: a chain starts here."""
    kv_from: int | None = None
    """The rank that sends the next stage's block."""
    grad_to: int | None = None
    """The rank that gets the gradient accumulated in the previous stage: the chain's next, or the block's home."""
    grad_home: bool = False
    """grad_to is the block's home: the gradient is complete."""
    grad_stays: bool = False
    """The block here is this rank's own, and this rank's part of its gradient does not travel."""
    grad_from: int | None = None
    """The rank that sends the sum of the earlier ranks' gradients of this stage's block."""
    home_from: int | None = None
    """The rank that sends the finished gradient of this rank's own block."""


@dataclass(frozen=True)
class Chain:
    """One direction of travel, +1 or -1: the block of rank s makes reach[s] hops."""

    direction: int
    reach: tuple[int, ...]
    carries_home: bool
    """The gradient leaves home with the home's own part: the chain is closed, so the gradient returns there anyway."""


@dataclass(frozen=True, eq=False)  # compared and cached by identity: a large ring's table takes long to hash
class Schedule:
    """The schedule of the whole ring; `stages(rank)` is one rank's."""

    ring: int
    needed: tuple[tuple[bool, ...], ...]
    """needed[rank][source]: a query of the rank sees a key of the source."""
    chains: tuple[Chain, ...]

    def stages(self, rank: int) -> tuple[Stage, ...]:
        """Return the stages of one rank; all ranks have equally many."""
        return _stages(self, rank)

    @property
    def hops(self) -> int:
        """The number of K/V messages of the whole ring in one pass."""
        return sum(sum(chain.reach) for chain in self.chains)

    @property
    def gradient_hops(self) -> int:
        """The number of dK/dV messages of the whole ring in one backward pass."""
        return sum(hops + chain.carries_home for chain in self.chains for hops in chain.reach if hops)


@lru_cache(maxsize=256)
def make_schedule(layout: str, ring: int, length: int, rule: Rule) -> Schedule:
    """Return the schedule for `length` tokens (padded) over `ring` ranks."""
    blocks = [get_layout(layout).spans(rank, ring, length) for rank in range(ring)]
    needed = _needed(blocks, rule)
    upwards, downwards = zip(*(_fewest_hops(needed, source) for source in range(ring)), strict=True)
    chains = []
    for direction, reach in ((1, upwards), (-1, downwards)):
        if any(reach):
            chains.append(Chain(direction, reach, all(hops == ring - 1 for hops in reach)))
    return Schedule(ring, needed, tuple(chains))


def work(layout: str, ring: int, length: int, rule: Rule) -> list[list[int]]:
    """Return the exact number of visible (query, key) pairs, work[rank][source]; row sums show a layout's balance."""
    blocks: list[tuple[Span, ...]] = [get_layout(layout).spans(rank, ring, length) for rank in range(ring)]
    return [[visible(q, k, rule) for k in blocks] for q in blocks]


def _needed(blocks: list[tuple[Span, ...]], rule: Rule) -> tuple[tuple[bool, ...], ...]:
    """Return needed[rank][source]: whether any query of the rank sees any key of the source.

    band() depends only on the distance and the lengths of two spans, since all have one stride, so each combination is
    computed once.
    """
    found: dict[tuple[int, int, int], bool] = {}

    def visible_pair(q: Span, k: Span) -> bool:
        key = (q.start - k.start, q.count, k.count)
        if key not in found:
            found[key] = band(q, k, rule) is not None
        return found[key]

    trimmed = [tuple(trim(span, rule.length) for span in reversed(block)) for block in blocks]
    return tuple(tuple(any(visible_pair(q, k) for q in mine for k in theirs) for theirs in trimmed) for mine in trimmed)


def _fewest_hops(needed: tuple[tuple[bool, ...], ...], source: int) -> tuple[int, int]:
    """Return the fewest hops (upwards, downwards) in which the block of `source` reaches every rank that needs it."""
    ring = len(needed)
    distances = [d for d in range(1, ring) if needed[(source + d) % ring][source]]
    # Each cut serves the first i distances upwards and the others downwards.
    cuts = [
        (distances[i - 1] if i else 0, ring - distances[i] if i < len(distances) else 0)
        for i in range(len(distances) + 1)
    ]
    return min(cuts, key=lambda cut: (cut[0] + cut[1], cut[1]))


@lru_cache(maxsize=256)
def _stages(schedule: Schedule, rank: int) -> tuple[Stage, ...]:
    """Return one rank's stages: stage 0, then one stage per hop of each chain in turn, then the last gradients."""
    stays = not any(chain.carries_home for chain in schedule.chains)
    count = 2 + sum(max(chain.reach) for chain in schedule.chains)
    stages: list[dict[str, int | bool]] = [{} for _ in range(count)]
    stages[0].update(source=rank, compute=schedule.needed[rank][rank], grad_stays=stays)
    before = 0  # index of the stage before the chain's first hop: hop t delivers the block of stage before + t
    for chain in schedule.chains:
        _travel(stages, schedule, chain, rank, before)
        _return_home(stages, schedule, chain, rank, before)
        before += max(chain.reach)
    return tuple(Stage(**stage) for stage in stages)  # type: ignore[arg-type]


def _travel(stages: list[dict[str, int | bool]], schedule: Schedule, chain: Chain, rank: int, before: int) -> None:
    """Add a chain's hops: K/V are sent during the stage before the one that computes with them, gradients one later."""
    following, preceding = (rank + chain.direction) % schedule.ring, (rank - chain.direction) % schedule.ring
    stages[before]["chain_begins"] = True
    for hop in range(1, max(chain.reach) + 1):
        previous, stage = stages[before + hop - 1], stages[before + hop]
        held = (rank - chain.direction * (hop - 1)) % schedule.ring  # home of the block here in the previous stage
        source = (rank - chain.direction * hop) % schedule.ring  # home of the block that this hop delivers
        # At home the gradient is not yet under way, unless it takes the home's own part along.
        gradient_moves = hop > 1 or chain.carries_home
        if chain.reach[held] >= hop:
            previous["kv_to"] = following
            if gradient_moves:
                stage["grad_to"] = following
        if chain.reach[source] >= hop:
            previous["kv_from"] = preceding
            stage.update(source=source, compute=schedule.needed[rank][source])
            if gradient_moves:
                stage["grad_from"] = preceding


def _return_home(stages: list[dict[str, int | bool]], schedule: Schedule, chain: Chain, rank: int, before: int) -> None:
    """Send home the gradients that are complete: in the stage after the last hop of the block."""
    for hop in range(1, max(chain.reach) + 1):
        source = (rank - chain.direction * hop) % schedule.ring
        if chain.reach[source] == hop:
            stages[before + hop + 1].update(grad_to=source, grad_home=True)
    own = chain.reach[rank]
    if own:
        stages[before + own + 1]["home_from"] = (rank + chain.direction * own) % schedule.ring
