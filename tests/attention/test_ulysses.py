"""The all-to-all of a ulysses group: tokens of all heads to all tokens of some heads, and back."""

from __future__ import annotations

import pytest
import torch
from attention import dense
from attention.hybrid import parts

from longctx.attention import simulate
from longctx.attention.comm import Counters, Link
from longctx.attention.heads import assign_heads
from longctx.attention.hybrid.ulysses import KEYS, PER_TOKEN, QUERIES, HeadExchange, UlyssesGroup, count_exchange
from longctx.layout import get_layout

LAYOUTS = ("contiguous", "zigzag", "striped")
GRIDS = ((1, 2), (2, 2), (1, 4), (2, 3), (3, 2), (4, 2), (2, 5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_members_in_order_restore_the_ring_ranks_sequence(layout: str, grid: tuple[int, int]) -> None:
    ring, ulysses = grid
    length = get_layout(layout).padded_length(100, ring, ulysses)
    index = parts(layout, ring, ulysses, length)
    for rank, own in enumerate(dense.parts(layout, ring, length)):
        assert torch.equal(torch.cat(index[rank * ulysses : (rank + 1) * ulysses]), own)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 2), (5, 5, 3), (8, 2, 4)])
def test_there_and_back(heads: int, kv_heads: int, size: int) -> None:
    """Tensors of three dtypes in one message; a key head that n ranks compute comes back as the sum of n copies."""
    tokens, shares = 3, assign_heads(heads, kv_heads, size)
    q = torch.randn(2, heads, tokens * size, 5, dtype=torch.float64)
    k = torch.randn(2, kv_heads, tokens * size, 3)
    ids = torch.arange(2 * tokens * size, dtype=torch.int32).view(2, -1)

    def worker(link: Link, group: UlyssesGroup) -> list[torch.Tensor]:
        here = slice(group.rank * tokens, (group.rank + 1) * tokens)
        exchange, share = HeadExchange(group, shares), shares[group.rank]
        sent = [(QUERIES, q[:, :, here]), (PER_TOKEN, ids[:, here]), (KEYS, k[:, :, here])]
        own_q, every_id, own_k = exchange.to_heads(sent)
        assert torch.equal(own_q, q[:, share.queries]) and torch.equal(own_k, k[:, share.keys])
        assert torch.equal(every_id, ids)
        return exchange.to_tokens([(QUERIES, own_q), (KEYS, own_k)])

    results, counters = simulate.run_grid(1, size, worker)
    copies = torch.tensor([sum(key in range(kv_heads)[s.keys] for s in shares) for key in range(kv_heads)])
    assert torch.equal(torch.cat([x for x, _ in results], 2), q)
    torch.testing.assert_close(torch.cat([x for _, x in results], 2), k * copies[:, None, None])
    assert all(c.exchanges == 2 and c.messages == 2 * (size - 1) for c in counters)


def test_what_stays_on_this_rank_is_not_counted() -> None:
    counters = Counters()
    count_exchange(1, [16, 100, 32], counters)
    assert (counters.exchanges, counters.messages, counters.bytes, counters.exchange_bytes) == (1, 2, 48, 48)
