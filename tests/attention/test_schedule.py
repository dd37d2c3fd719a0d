"""The schedule: every block reaches whoever needs it, in the fewest hops, and every message has two ends."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention.band import Rule, make_rule, sees
from longctx.attention.schedule import Schedule, make_schedule, work
from longctx.layout import get_layout

LAYOUTS = ("contiguous", "zigzag", "striped")
CAUSAL, FULL = make_rule(True, None), make_rule(False, None)
limits = st.one_of(st.none(), st.integers(0, 60))


def walk(schedule: Schedule) -> None:
    """Play all ranks together: blocks arrive where the stages say they are, and gradients collect every part once."""
    ring = schedule.ring
    stages = [schedule.stages(rank) for rank in range(ring)]
    assert len({len(s) for s in stages}) == 1
    held: list[int | None] = list(range(ring))
    parts: list[Counter[int]] = [Counter() for _ in range(ring)]  # of the block here: which ranks have added to it
    home: list[Counter[int]] = [Counter() for _ in range(ring)]
    leaving: list[tuple[int | None, Counter[int]]] = [(None, Counter()) for _ in range(ring)]
    met = [[] for _ in range(ring)]  # type: ignore[var-annotated]
    for index in range(len(stages[0])):
        now = [s[index] for s in stages]
        for rank, stage in enumerate(now):
            assert stage.source == held[rank]
            if stage.source is not None:
                assert stage.source not in met[rank], "a block met twice"
                met[rank].append(stage.source)
                parts[rank] = Counter([rank])
        for rank, stage in enumerate(now):  # gradients of the previous stage's blocks
            if stage.grad_to is not None:
                peer, (block, collected) = now[stage.grad_to], leaving[rank]
                if stage.grad_home:
                    assert block == stage.grad_to and peer.home_from == rank
                    home[stage.grad_to] += collected
                else:
                    assert peer.source == block and peer.grad_from == rank
                    parts[stage.grad_to] += collected
            elif leaving[rank][0] is not None:
                assert leaving[rank][0] == rank, "a visiting block's gradient was dropped"
            assert stage.grad_from is None or now[stage.grad_from].grad_to == rank
            assert stage.home_from is None or (now[stage.home_from].grad_to == rank and now[stage.home_from].grad_home)
            if stage.grad_stays:
                home[rank] += parts[rank]
                parts[rank] = Counter()
        following: list[int | None] = [None] * ring
        for rank, stage in enumerate(now):
            if stage.kv_to is not None:
                assert now[stage.kv_to].kv_from == rank
                following[stage.kv_to] = rank if stage.chain_begins else held[rank]
            assert stage.kv_from is None or now[stage.kv_from].kv_to == rank
        leaving = [(None if stage.grad_stays else held[rank], parts[rank]) for rank, stage in enumerate(now)]
        held = following
    for rank in range(ring):
        assert met[rank][0] == rank, "own block first"
        needed = {source for source in range(ring) if schedule.needed[rank][source]}
        assert needed <= set(met[rank])
        assert all(
            stage.compute == schedule.needed[rank][stage.source] for stage in stages[rank] if stage.source is not None
        )
        visited = {other for other in range(ring) if rank in met[other]}
        assert home[rank] == Counter(visited | {rank}), "every visited rank's part, exactly once"


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(LAYOUTS),
    st.integers(1, 9),
    st.integers(1, 6),
    st.builds(Rule, limits, limits, st.one_of(st.none(), st.integers(1, 100))),
)
def test_every_message_has_two_ends_and_every_part_comes_home(layout: str, ring: int, chunk: int, rule: Rule) -> None:
    length = get_layout(layout).multiple(ring) * chunk
    schedule = make_schedule(layout, ring, length, rule)
    walk(schedule)
    blocks = [get_layout(layout).spans(rank, ring, length) for rank in range(ring)]
    for rank in range(ring):
        for source in range(ring):
            assert schedule.needed[rank][source] == sees(blocks[rank], blocks[source], rule)


@pytest.mark.parametrize("ring", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("rule", [CAUSAL, FULL])
def test_a_full_ring_makes_the_closed_form_of_hops(ring: int, rule: Rule) -> None:
    for layout in ("zigzag", "striped") if rule == CAUSAL else LAYOUTS:
        schedule = make_schedule(layout, ring, 4 * ring, rule)
        assert schedule.hops == ring * (ring - 1)
        assert schedule.gradient_hops == ring * ring
        walk(schedule)


def test_a_ring_of_one_sends_nothing() -> None:
    for layout in LAYOUTS:
        schedule = make_schedule(layout, 1, 8, CAUSAL)
        assert schedule.hops == schedule.gradient_hops == 0 and len(schedule.stages(0)) == 2


def test_causal_contiguous_sends_no_block_to_those_before_it() -> None:
    schedule = make_schedule("contiguous", 8, 64, CAUSAL)
    assert schedule.hops == schedule.gradient_hops == sum(range(8))


@pytest.mark.parametrize("ring", [2, 4, 8, 64])
def test_a_window_is_sent_only_as_far_as_it_reaches(ring: int) -> None:
    chunk = 16
    for window, hops in ((1, 0), (2, 1), (chunk + 1, 1), (chunk + 2, 2)):
        schedule = make_schedule("contiguous", ring, chunk * ring, make_rule(True, window))
        assert schedule.hops == sum(min(hops, ring - 1 - rank) for rank in range(ring))
    # zigzag chunks are half as long and have a neighbour on either side, but for the two ends
    zigzag = make_schedule("zigzag", ring, chunk * ring, make_rule(True, chunk // 2))
    assert zigzag.hops == 2 * (ring - 1)
    assert ring == 2 or zigzag.gradient_hops == zigzag.hops
    striped = make_schedule("striped", ring, chunk * ring, make_rule(True, 2))
    assert striped.hops == ring


def test_hops_are_the_fewest_possible() -> None:
    for layout in LAYOUTS:
        for window in (1, 2, 5, 9, 17, None):
            for causal in (True, False):
                rule = make_rule(causal, None if window is None else (window - 1, window - 1))
                schedule = make_schedule(layout, 6, 48, rule)
                for source in range(6):
                    distances = {d for d in range(1, 6) if schedule.needed[(source + d) % 6][source]}
                    fewest = min(
                        f + b for f in range(6) for b in range(6) if distances <= {*range(f + 1), *range(6 - b, 6)}
                    )
                    assert sum(chain.reach[source] for chain in schedule.chains) == fewest


def test_padding_beyond_the_length_is_not_sent() -> None:
    schedule = make_schedule("contiguous", 4, 64, Rule(None, None, 20))  # ranks 2 and 3 hold padding only
    assert schedule.needed == ((True, True, False, False),) * 2 + ((False,) * 4,) * 2
    assert schedule.hops == schedule.gradient_hops == 2


@pytest.mark.parametrize("ring", [2, 4, 8, 32])
def test_work_is_balanced_as_the_closed_forms_say(ring: int) -> None:
    chunk, length = 32, 32 * ring
    totals = {layout: [sum(row) for row in work(layout, ring, length, CAUSAL)] for layout in LAYOUTS}
    mean = length * (length + 1) / 2 / ring
    assert len(set(totals["zigzag"])) == 1 and totals["zigzag"][0] == mean
    assert max(totals["contiguous"]) / mean == pytest.approx((2 * ring - 1) / ring, rel=1 / chunk)
    assert max(totals["striped"]) / mean <= 1 + 1 / chunk
    for row, totals_row in enumerate(work("zigzag", ring, length, CAUSAL)):
        assert all(pairs == chunk * chunk // 2 for source, pairs in enumerate(totals_row) if source != row)


def test_critical_paths_of_the_three_layouts() -> None:
    """docs/methods/ring.md "Layouts", 32 tokens on 4 ranks: the longest step of each stage, summed."""
    paths = {}
    for layout in LAYOUTS:
        table = work(layout, 4, 32, CAUSAL)
        paths[layout] = sum(max(table[rank][(rank - step) % 4] for rank in range(4)) for step in range(4))
    assert paths == {"contiguous": 228, "striped": 144, "zigzag": 132}
