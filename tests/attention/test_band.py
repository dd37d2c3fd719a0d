"""Bands and their pieces against brute force, pair by pair."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention.band import Kind, Rule, band, make_rule, pieces, sees, trim, visible
from longctx.errors import AttentionError
from longctx.layout import Span

limits = st.one_of(st.none(), st.integers(0, 20))
rules = st.builds(Rule, limits, limits, st.one_of(st.none(), st.integers(1, 40)))
spans = st.tuples(st.integers(-5, 30), st.integers(0, 14))


def pairs(q: Span, k: Span, rule: Rule) -> set[tuple[int, int]]:
    """Visible pairs of local indices, from the definition."""
    found = set()
    for a in range(q.count):
        for b in range(k.count):
            i, j = q.start + a * q.stride, k.start + b * k.stride
            near = (rule.left is None or i - j <= rule.left) and (rule.right is None or j - i <= rule.right)
            if near and (rule.length is None or max(i, j) < rule.length):
                found.add((a, b))
    return found


@settings(deadline=None, max_examples=400)
@given(spans, spans, st.integers(1, 3), rules, st.integers(2, 5))
def test_pieces_cover_every_visible_pair_once(
    q_span: tuple[int, int], k_span: tuple[int, int], stride: int, rule: Rule, tile: int
) -> None:
    q, k = Span(*q_span, stride), Span(*k_span, stride)
    expected = pairs(q, k, rule)
    assert visible((q,), (k,), rule) == len(expected)
    assert sees((q,), (k,), rule) == bool(expected)
    q, k = trim(q, rule.length), trim(k, rule.length)
    edges = band(q, k, rule)
    covered = []
    for piece in pieces(q.count, k.count, *edges, tile=tile) if edges else ():
        assert 0 <= piece.q0 < piece.q1 <= q.count and 0 <= piece.k0 < piece.k1 <= k.count
        if piece.kind == Kind.DENSE:
            assert piece.q1 - piece.q0 <= tile and piece.k1 - piece.k0 <= tile
        for a in range(piece.q0, piece.q1):
            for b in range(piece.k0, piece.k1):
                if piece.kind == Kind.TRIANGLE and b - piece.k0 > a - piece.q0:
                    continue
                if piece.kind == Kind.DENSE and (a, b) not in expected:
                    continue
                covered.append((a, b))
    assert sorted(covered) == sorted(expected)


def test_without_a_far_edge_a_band_is_one_rectangle_and_one_triangle() -> None:
    for low in range(-12, 12):
        kinds = [piece.kind for piece in pieces(12, 12, low, 11, tile=2)]
        assert kinds in ([Kind.FULL], [Kind.TRIANGLE], [Kind.FULL, Kind.TRIANGLE])


def test_a_long_window_costs_little_more_than_its_pairs() -> None:
    n, window, tile = 8192, 4096, 512
    area = 0.0
    for piece in pieces(n, n, 0, window - 1, tile=tile):
        size = (piece.q1 - piece.q0) * (piece.k1 - piece.k0)
        area += size / 2 if piece.kind == Kind.TRIANGLE else size
    ideal = visible((Span(0, n),), (Span(0, n),), Rule(window - 1, 0))
    assert area <= 1.10 * ideal


@pytest.mark.parametrize(
    ("causal", "window", "rule"),
    [
        (True, None, Rule(None, 0)),
        (False, None, Rule(None, None)),
        (True, 5, Rule(4, 0)),
        (False, 5, Rule(4, None)),
        (False, (3, 2), Rule(3, 2)),
        (True, (3, 2), Rule(3, 0)),
        (False, (-1, 2), Rule(None, 2)),
        (False, (None, 0), Rule(None, 0)),
    ],
)
def test_causal_and_window_make_one_rule(causal: bool, window: int | tuple[int, int] | None, rule: Rule) -> None:
    assert make_rule(causal, window) == rule


@pytest.mark.parametrize("window", [0, -3, True, "8", (1,), (1, 2, 3), (-2, 0), (1.5, 0), 2.0])
def test_a_bad_window_is_refused_by_name(window: object) -> None:
    with pytest.raises(AttentionError, match="window"):
        make_rule(True, window)  # type: ignore[arg-type]


def test_a_wider_window_never_sees_less() -> None:
    counts = [visible((Span(0, 64),), (Span(0, 64),), make_rule(True, w)) for w in range(1, 66)]
    assert all(a <= b for a, b in pairwise(counts)) and counts[63] == counts[64] == 64 * 65 // 2
