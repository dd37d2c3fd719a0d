"""The exclusive scan of states over ranks: both forms equal a loop over all chunks, and so do their gradients."""

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
from longctx.bounded.ranks.scan import associative_exclusive_scan, map_chunks
from longctx.errors import AttentionError

from tolerances import tolerance

EXACT = tolerance("fp64")
MONOIDS: dict[str, tuple[Callable[[Value, Value], Value], list[float]]] = {  # the fills of its identity
    "add": (monoid.add, [0.0]),
    "average": (monoid.average, [-torch.inf, 0.0]),
    "total": (monoid.total, [-torch.inf, 0.0]),
    "mass": (monoid.add_mass, [-torch.inf]),
}


def states(name: str, chunks: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return a tensor (chunks, B, G, M[, D]) for each member of the state, and the documents (chunks, B)."""
    g = torch.Generator().manual_seed(seed)
    _, fills = MONOIDS[name]
    members = []
    ids = torch.randint(0, 2, (chunks, 2), generator=g).cumsum(0)
    ids[torch.rand(chunks, 2, generator=g) < 0.2] = -1
    for fill in fills:
        shape = (chunks, 2, 1, 3) if fill else (chunks, 2, 1, 3, 4)
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        x[ids < 0] = fill  # a chunk of padding writes nothing
        members.append(x)
    return members, ids


def identity(name: str, members: list[torch.Tensor]) -> Value:
    fills = MONOIDS[name][1]
    empty = (torch.full_like(x[0], fill) for x, fill in zip(members, fills, strict=True))
    return *empty, torch.full((2,), -1)


def loss(state: Value, weights: list[torch.Tensor], chunk: int) -> torch.Tensor:
    finite = [torch.where(x.isfinite(), x, 0.0) for x in state[:-1]]
    return sum(((x * w[chunk]).sum() for x, w in zip(finite, weights, strict=True)), torch.zeros(()))


def by_a_loop(name: str, members: list[torch.Tensor], ids: torch.Tensor, reverse: bool) -> list[Value]:
    """Return what every chunk receives, and the combination of all chunks."""
    op, running = MONOIDS[name][0], identity(name, members)
    found = {}
    for chunk in reversed(range(len(ids))) if reverse else range(len(ids)):
        found[chunk] = running
        own = (*(x[chunk] for x in members), ids[chunk])
        running = op(own, running) if reverse else op(running, own)
    return [*(found[chunk] for chunk in range(len(ids))), running]


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
    chunk_map = map_chunks(layout, ring)
    members, ids = states(name, chunk_map.total, seed)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype) for x in members]
    leaves = [x.clone().requires_grad_() for x in members]
    *expected, everything = by_a_loop(name, leaves, ids, reverse)
    losses = sum((loss(state, weights, chunk) for chunk, state in enumerate(expected)), torch.zeros(()))
    if total:
        losses = losses + ring * loss(everything, weights, 0)
    wanted = torch.autograd.grad(losses, leaves)

    def worker(link: Link) -> tuple[list[Value], list[torch.Tensor | None]]:
        here = chunk_map.by_rank[link.rank]
        mine = [[x[chunk].clone().requires_grad_() for x in members] for chunk in here]
        local = [(*own, ids[chunk]) for own, chunk in zip(mine, here, strict=True)]
        found = associative_exclusive_scan(
            local, MONOIDS[name][0], identity(name, members), link, chunk_map, reverse=reverse, form=form, total=total
        )
        assert len(found) == len(here) + total
        part = sum((loss(state, weights, chunk) for chunk, state in zip(here, found, strict=False)), torch.zeros(()))
        part = part + loss(found[-1], weights, 0) if total else part
        flat = [x for own in mine for x in own]
        return found, list(torch.autograd.grad(part, flat, allow_unused=True))

    results, _ = simulate.run(ring, worker)
    for here, (found, gradients) in zip(chunk_map.by_rank, results, strict=True):
        count = len(members)
        for place, chunk in enumerate(here):
            assert found[place][-1].equal(expected[chunk][-1])
            same(found[place], expected[chunk])
            own = gradients[place * count : (place + 1) * count]
            assert max(direct.differences(own, [x[chunk] for x in wanted])) <= EXACT
        if total:
            same(found[-1], everything)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_messages_of_both_forms(layout: str) -> None:
    """One stage with a message to every later rank, or logarithmically many stages."""
    ring, chunk_map = 16, map_chunks(layout, 16)
    members, ids = states("add", chunk_map.total, 0)

    def messages(form: str) -> list[int]:
        def worker(link: Link) -> None:
            local = [(members[0][chunk], ids[chunk]) for chunk in chunk_map.by_rank[link.rank]]
            associative_exclusive_scan(local, monoid.add, identity("add", members), link, chunk_map, form=form)

        return [c.messages for c in simulate.run(ring, worker)[1]]

    legs = 1 if layout == "contiguous" else 2
    assert legs * 4 < max(messages("steps")) <= legs * (4 + 1)
    assert max(messages("gather")) == ring - 1


def test_a_ring_of_one_and_an_unknown_form() -> None:
    members, ids = states("average", 1, 3)
    nothing = identity("average", members)
    local = [(members[0][0], members[1][0], ids[0])]
    found = associative_exclusive_scan(local, monoid.average, nothing, LocalLink(), map_chunks("zigzag", 1))
    assert all(a.equal(b) for a, b in zip(found[0], nothing, strict=True))
    with pytest.raises(AttentionError, match="'gather' or 'steps'"):
        associative_exclusive_scan(local, monoid.average, nothing, LocalLink(), map_chunks("zigzag", 1), form="tree")
