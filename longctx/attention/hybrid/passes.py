"""The two passes of one rank where heads are exchanged for tokens inside and a ring runs outside.

The members of one ring rank give each other heads (`ulysses.py`), so that each holds the ring rank's whole local
sequence for its own heads; then the ring's passes run as ever, between ranks that hold the same heads; then tokens come
back. Knows nothing of processes, as `passes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from longctx.attention.arguments import wrapped
from longctx.attention.backends.base import Rows, accumulator_dtype
from longctx.attention.heads import Share, deal
from longctx.attention.hybrid.ulysses import KEYS, QUERIES, ROWS, Exchange, Members
from longctx.attention.operator import per_head
from longctx.attention.passes import Pair, Passes, split

Optional = torch.Tensor | None


@dataclass(frozen=True)
class Whole:
    """One rank's tensors after the exchange: U * T tokens of its own heads; key heads not yet expanded."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    documents: Optional
    out: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True)
class HybridPasses:
    """The two passes of one rank of a mesh with ulysses > 1.

    passes: of the ring among the ranks that hold the same heads; its scores are those of all heads.
    """

    members: Members
    passes: Passes
    heads: int
    kv_heads: int

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        documents: Optional,
        sink: Optional = None,
        with_lse: bool = True,
    ) -> tuple[torch.Tensor, Optional, Whole]:
        """(out (B, H, T, Dv) in q's dtype, lse (B, H, T) if wanted, what backward needs)."""
        share = self._share
        q, k, v, *ids = self._exchange.to_heads([(QUERIES, q), (KEYS, k), (KEYS, v), *_rows(documents)])
        ids_or_none = ids[0] if ids else None
        own_sink = None if sink is None else sink[share.queries]
        out, lse = self._passes().forward(q, *expand(share, k, v), ids_or_none, own_sink)
        back = self._exchange.to_tokens([(QUERIES, out), *([(QUERIES, lse)] if with_lse else [])])
        return back[0], back[1] if with_lse else None, Whole(q, k, v, ids_or_none, out, lse)

    def gather(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        documents: Optional,
        out: torch.Tensor,
        lse: torch.Tensor,
        dout: torch.Tensor,
        dlse: Optional,
    ) -> tuple[Whole, torch.Tensor, Optional]:
        """(what backward needs, dout, dlse) after an exchange of all of them but lse, which never left its heads."""
        sent = [(QUERIES, dout), (QUERIES, q), (QUERIES, out), (KEYS, k), (KEYS, v), *_rows(documents)]
        if dlse is not None:
            sent.append((QUERIES, dlse))
        dout, q, out, k, v, *rest = self._exchange.to_heads(sent)
        ids = None if documents is None else rest[0]
        return Whole(q, k, v, ids, out, lse), dout, None if dlse is None else rest[-1]

    def gather_gradients(self, dout: torch.Tensor, dlse: Optional) -> tuple[torch.Tensor, Optional]:
        """(dout, dlse) after the exchange."""
        dout, *rest = self._exchange.to_heads([(QUERIES, dout), *([] if dlse is None else [(QUERIES, dlse)])])
        return dout, rest[0] if rest else None

    def backward(
        self, whole: Whole, dout: torch.Tensor, dlse: Optional, sink: Optional = None, alibi: Optional = None
    ) -> tuple[torch.Tensor, ...]:
        """(dq, dk, dv) of this rank's tokens, (dsink, dalibi) (H,) of this rank's heads over all members' tokens, zero
        elsewhere: the sum over ranks is the whole gradient, as it is where every rank has its own tokens' part."""
        share = self._share
        rows = Rows(whole.q, whole.out, whole.lse, dout, dlse)
        k, v = expand(share, whole.k, whole.v)
        dq, dkv, dslopes = self._passes().backward(rows, k, v, whole.documents)
        dk, dv = fold(share, split(dkv, k, v))
        dq, dk, dv = self._exchange.to_tokens([(QUERIES, dq), (KEYS, dk), (KEYS, dv)])
        own_sink, own_alibi = (None if x is None else x[share.queries] for x in (sink, alibi))
        found = per_head(rows, own_sink, own_alibi, dslopes)
        return dq, dk, dv, *(self._spread(x, like) for x, like in zip(found, (sink, alibi), strict=True))

    def _spread(self, own: torch.Tensor, like: Optional) -> torch.Tensor:
        """(H,) with this rank's heads' values, zero elsewhere; empty where there is no such input."""
        if like is None:
            return own
        every = torch.zeros_like(like)
        every[self._share.queries] = own
        return every

    @property
    def _share(self) -> Share:
        return deal(self.heads, self.kv_heads, self.members.size)[self.members.rank]

    @property
    def _exchange(self) -> Exchange:
        return Exchange(self.members, deal(self.heads, self.kv_heads, self.members.size))

    def _passes(self) -> Passes:
        """The ring's, for these heads alone."""
        scores, queries = self.passes.scores, self._share.queries
        slopes = None if scores.alibi is None else scores.alibi[queries]
        seeds = None if scores.seeds is None else seeds_from(scores.seeds, queries.start)
        return replace(self.passes, scores=replace(scores, alibi=slopes, seeds=seeds))


def _rows(documents: Optional) -> list[tuple[str, torch.Tensor]]:
    return [] if documents is None else [(ROWS, documents)]


def seeds_from(seeds: torch.Tensor, head: int) -> torch.Tensor:
    """(B,) seeds under which head 0 drops what `head` drops under these (kernels/flash/dropout.py counts heads by
    adding to a seed's upper half)."""
    return seeds + wrapped(head * 0x9E3779B9 << 32)


def expand(share: Share, k: torch.Tensor, v: torch.Tensor) -> Pair:
    """Keys and values with equally many query heads each: as they are, or copied where they serve unequal numbers."""
    if share.expand is None:
        return k, v
    index = torch.tensor(share.expand, device=k.device)
    return k.index_select(1, index), v.index_select(1, index)


def fold(share: Share, gradients: Pair) -> Pair:
    """The gradients of what `expand` was given; copies add up in fp32 or better."""
    if share.expand is None:
        return gradients
    index = torch.tensor(share.expand, device=gradients[0].device)
    totals = []
    for x in gradients:
        dtype = accumulator_dtype(x.dtype)
        total = x.new_zeros((x.shape[0], share.key_count, *x.shape[2:]), dtype=dtype)
        totals.append(total.index_add_(1, index, x.to(dtype)).to(x.dtype))
    return totals[0], totals[1]
