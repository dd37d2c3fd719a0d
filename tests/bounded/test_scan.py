"""The exclusive scan of states over ranks: both forms equal a loop over all stretches, and so do their gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bounded import direct
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention import simulate
from longctx.attention.comm import Link, LocalLink
from longctx.bounded.ranks import monoid
from longctx.bounded.ranks.exchange import Value
from longctx.bounded.ranks.scan import associative_exclusive_scan, map_stretches
from longctx.errors import AttentionError

from tolerances import tolerance

EXACT = tolerance("fp64")
MONOIDS: dict[str, tuple[Callable[[Value, Value], Value], list[float]]] = {  # the fills of its identity
    "add": (monoid.add, [0.0]),
    "average": (monoid.average, [-torch.inf, 0.0]),
    "total": (monoid.total, [-torch.inf, 0.0]),
    "mass": (monoid.add_mass, [-torch.inf]),
}


def states(name: str, stretches: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return a tensor (stretches, B, G, M[, D]) for each member of the state, and the documents (stretches, B)."""
    g = torch.Generator().manual_seed(seed)
    _, fills = MONOIDS[name]
    members = []
    ids = torch.randint(0, 2, (stretches, 2), generator=g).cumsum(0)
    ids[torch.rand(stretches, 2, generator=g) < 0.2] = -1
    for fill in fills:
        shape = (stretches, 2, 1, 3) if fill else (stretches, 2, 1, 3, 4)
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        x[ids < 0] = fill  # a stretch of padding writes nothing
        members.append(x)
    return members, ids


def identity(name: str, members: list[torch.Tensor]) -> Value:
    fills = MONOIDS[name][1]
    empty = (torch.full_like(x[0], fill) for x, fill in zip(members, fills, strict=True))
    return *empty, torch.full((2,), -1)


def written(x: torch.Tensor, ids: torch.Tensor, fill: float) -> torch.Tensor:
    """Return x with `fill` where a stretch is padding, as masked writing gives it: no gradient reaches such a stretch.

    Without the mask that gradient is undefined: a state without a document counts or not, depending on the order.
    """
    return x.masked_fill((ids < 0).reshape(*ids.shape, *[1] * (x.dim() - ids.dim())), fill)


def loss(state: Value, weights: list[torch.Tensor], stretch: int) -> torch.Tensor:
    finite = [torch.where(x.isfinite(), x, 0.0) for x in state[:-1]]
    return sum(((x * w[stretch]).sum() for x, w in zip(finite, weights, strict=True)), torch.zeros(()))


def by_a_loop(name: str, members: list[torch.Tensor], ids: torch.Tensor, reverse: bool) -> list[Value]:
    """Return what every stretch receives, and the combination of all stretches."""
    op, running = MONOIDS[name][0], identity(name, members)
    found = {}
    for stretch in reversed(range(len(ids))) if reverse else range(len(ids)):
        found[stretch] = running
        masked = (written(x[stretch], ids[stretch], fill) for x, fill in zip(members, MONOIDS[name][1], strict=True))
        own = (*masked, ids[stretch])
        running = op(own, running) if reverse else op(running, own)
    return [*(found[stretch] for stretch in range(len(ids))), running]


def same(ours: Value, theirs: Value) -> None:
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        assert a.isfinite().equal(b.isfinite())
        finite = [torch.where(x.isfinite(), x, 0.0) for x in (a, b)]
        assert direct.differences(finite[:1], finite[1:])[0] <= EXACT


@settings(max_examples=30)
@given(
    st.sampled_from(list(MONOIDS)),
    st.sampled_from(["contiguous", "zigzag"]),
    st.integers(2, 9),
    st.sampled_from(["gather", "steps", "auto"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_scan_is_a_loop(name: str, layout: str, ring: int, form: str, reverse: bool, total: bool, seed: int) -> None:
    stretch_map = map_stretches(layout, ring)
    members, ids = states(name, stretch_map.total, seed)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype) for x in members]
    leaves = [x.clone().requires_grad_() for x in members]
    *expected, everything = by_a_loop(name, leaves, ids, reverse)
    losses = sum((loss(state, weights, stretch) for stretch, state in enumerate(expected)), torch.zeros(()))
    if total:
        losses = losses + ring * loss(everything, weights, 0)
    wanted = torch.autograd.grad(losses, leaves)

    def worker(link: Link) -> tuple[list[Value], list[torch.Tensor | None]]:
        here = stretch_map.by_rank[link.rank]
        mine = [[x[stretch].clone().requires_grad_() for x in members] for stretch in here]
        local = []
        for own, stretch in zip(mine, here, strict=True):
            masked = (written(x, ids[stretch], fill) for x, fill in zip(own, MONOIDS[name][1], strict=True))
            local.append((*masked, ids[stretch]))
        found = associative_exclusive_scan(
            local, MONOIDS[name][0], identity(name, members), link, stretch_map, reverse=reverse, form=form, total=total
        )
        assert len(found) == len(here) + total
        part = sum(
            (loss(state, weights, stretch) for stretch, state in zip(here, found, strict=False)), torch.zeros(())
        )
        part = part + loss(found[-1], weights, 0) if total else part
        flat = [x for own in mine for x in own]
        return found, list(torch.autograd.grad(part, flat, allow_unused=True))

    results, _ = simulate.run(ring, worker)
    for here, (found, gradients) in zip(stretch_map.by_rank, results, strict=True):
        count = len(members)
        for place, stretch in enumerate(here):
            assert found[place][-1].equal(expected[stretch][-1])
            same(found[place], expected[stretch])
            own = gradients[place * count : (place + 1) * count]
            assert max(direct.differences(own, [x[stretch] for x in wanted])) <= EXACT
        if total:
            same(found[-1], everything)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_messages_of_both_forms(layout: str) -> None:
    """One stage with a message to every later rank, or logarithmically many stages."""
    ring, stretch_map = 16, map_stretches(layout, 16)
    members, ids = states("add", stretch_map.total, 0)

    def messages(form: str) -> list[int]:
        def worker(link: Link) -> None:
            local = [(members[0][stretch], ids[stretch]) for stretch in stretch_map.by_rank[link.rank]]
            associative_exclusive_scan(local, monoid.add, identity("add", members), link, stretch_map, form=form)

        return [c.messages for c in simulate.run(ring, worker)[1]]

    legs = 1 if layout == "contiguous" else 2
    assert legs * 4 < max(messages("steps")) <= legs * (4 + 1)
    assert max(messages("gather")) == ring - 1


def test_a_ring_of_one_and_an_unknown_form() -> None:
    members, ids = states("average", 1, 3)
    nothing = identity("average", members)
    local = [(members[0][0], members[1][0], ids[0])]
    found = associative_exclusive_scan(local, monoid.average, nothing, LocalLink(), map_stretches("zigzag", 1))
    assert all(a.equal(b) for a, b in zip(found[0], nothing, strict=True))
    with pytest.raises(AttentionError, match="'gather' or 'steps'"):
        associative_exclusive_scan(local, monoid.average, nothing, LocalLink(), map_stretches("zigzag", 1), form="tree")
