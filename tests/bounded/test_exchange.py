"""States sent between ranks arrive unchanged, and their gradients return to the rank that sent them."""

from __future__ import annotations

import torch

from longctx.attention import simulate
from longctx.attention.comm import Link
from longctx.bounded.ranks.exchange import StretchMap, begin, collect, one_per_rank, shift

ZIGZAG = StretchMap(((0, 5), (1, 4), (2, 3)))


def state(stretch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((2, 1, 3), float(stretch), dtype=torch.float64).requires_grad_(), torch.tensor(
        [stretch, -stretch]
    )


def test_chunks_are_numbered_from_either_end() -> None:
    assert ZIGZAG.total == 6 and ZIGZAG.reversed().by_rank == ((5, 0), (4, 1), (3, 2))
    assert one_per_rank(3).by_rank == ((0,), (1,), (2,))


def test_every_rank_gets_the_states_it_needs_and_returns_their_gradients() -> None:
    """Each rank needs the stretches before its last one; its loss weights stretch c with c + 1, and its rank with
    10."""

    def worker(link: Link) -> tuple[list[int], list[float]]:
        mine = [state(stretch) for stretch in ZIGZAG.by_rank[link.rank]]
        pending = begin(mine, link, ZIGZAG, lambda source, here: source < max(here))
        known, token = pending.finish()
        for stretch, (x, ids) in known.items():
            assert x.eq(stretch).all() and ids.tolist() == [stretch, -stretch]
        assert float(token.detach()) == 0.0
        loss = sum((x.sum() * (stretch + 1) * 10**link.rank for stretch, (x, _) in known.items()), token)
        gradients = torch.autograd.grad(loss, [x for x, _ in mine])
        return sorted(known), [float(gradient[0, 0, 0]) for gradient in gradients]

    found, _ = simulate.run(3, worker)
    assert [stretches for stretches, _ in found] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [0, 1, 2, 3]]
    for rank, (_, gradients) in enumerate(found):
        for stretch, gradient in zip(ZIGZAG.by_rank[rank], gradients, strict=True):
            users = [other for other, (stretches, _) in enumerate(found) if stretch in stretches]
            assert gradient == (stretch + 1) * sum(10**user for user in users)


def test_one_rank_sends_nothing() -> None:
    def worker(link: Link) -> None:
        own = state(7)
        known, token = collect([own], link, one_per_rank(1), lambda source, here: True)
        assert known[0] is own and float(token.detach()) == 0.0

    _, counters = simulate.run(1, worker)
    assert counters[0].messages == 0


def test_a_shift_moves_states_along_the_ring_and_gradients_back() -> None:
    def worker(link: Link) -> tuple[float, list[int], float]:
        own, identity = state(link.rank + 1), (torch.zeros(2, 1, 3, dtype=torch.float64), torch.tensor([-1, -1]))
        x, ids = shift(own, identity, link, 2)
        if x.requires_grad:
            (x.sum() * 10**link.rank).backward()
        return float(x.detach()[0, 0, 0]), ids.tolist(), 0.0 if own[0].grad is None else float(own[0].grad[0, 0, 0])

    found, _ = simulate.run(4, worker)
    assert found == [(0.0, [-1, -1], 100.0), (0.0, [-1, -1], 1000.0), (1.0, [1, -1], 0.0), (2.0, [2, -2], 0.0)]
