"""Non-causal attention: every query reads the state of all tokens, on one device and on rings."""

from __future__ import annotations

import pytest
import torch
from bounded import direct
from bounded.sums import Sums, expected, sums
from drawn.draw import global_indices

from longctx.attention import simulate
from longctx.attention.comm import Link
from longctx.bounded.ranks.sequence import locate
from longctx.bounded.ranks.whole import over_all
from longctx.errors import AttentionError

from tolerances import tolerance

PADDED = direct.packed([[(-1, 3), (7, 21)], [(2, 10), (-1, 4), (2, 5), (-1, 5)]])
SEVERAL = direct.packed([[(7, 24)], [(1, 23), (2, 1)]])


def answers(x: Sums, ring: int, ids: torch.Tensor | None, before: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Return the output in order, and the state of every rank."""
    index = [torch.tensor(here) for here in global_indices("zigzag", ring, 24)]

    def worker(link: Link) -> tuple[torch.Tensor, torch.Tensor]:
        here = index[link.rank]
        local = locate(
            len(here), 2, here.device, mesh=None, layout="zigzag", document_ids=None if ids is None else ids[:, here],
            length=None, link=link,
        )  # fmt: skip
        queries = x.q[:, :, here] if x.q.shape[2] == 24 else x.q
        mine = Sums(queries, x.k[:, :, here], x.v[:, :, here])
        out, state = over_all(mine, local, None if before is None else (before,))
        return out, state[0]

    found, _ = simulate.run(ring, worker)
    out = torch.cat([out for out, _ in found], 2)
    return [out[:, :, torch.cat(index).argsort()] if x.q.shape[2] == 24 else out, *(state for _, state in found)]


@pytest.mark.parametrize("ring", [1, 2, 3])
@pytest.mark.parametrize("ids", [None, PADDED])
@pytest.mark.parametrize("after_a_state", [False, True])
def test_every_query_reads_all_tokens_and_the_state_before(
    ring: int, ids: torch.Tensor | None, after_a_state: bool
) -> None:
    x = sums(2, 24, 24)
    valid = torch.ones(2, 24, dtype=torch.bool) if ids is None else ids >= 0
    before = torch.randn(2, 2, 1, 3).double() if after_a_state else None
    added = 0.0 if before is None else before
    wanted = expected(x, valid[:, None] & valid[:, :, None])
    wanted = wanted + x.q * valid[:, None, :, None] * (added if before is None else before.repeat_interleave(2, 1))
    state = (x.v * valid[:, None, :, None]).sum(2, keepdim=True) + added
    dirty = Sums(*(y.masked_fill(~valid[:, None, :, None], torch.nan) for y in (x.q, x.k, x.v)))
    found = answers(dirty, ring, ids, before)
    assert max(direct.differences(found, [wanted, *[state] * ring])) <= tolerance("fp64")


def test_queries_of_cross_attention_are_no_padding() -> None:
    x = sums(2, 5, 24)
    wanted = expected(x, (PADDED >= 0)[:, None].expand(-1, 5, -1))
    assert direct.differences(answers(x, 1, PADDED)[:1], [wanted])[0] <= tolerance("fp64")


def test_several_documents_are_refused_on_every_rank() -> None:
    with pytest.raises(AttentionError, match="one state per document"):
        answers(sums(2, 24, 24), 2, SEVERAL)
