"""Forward and backward of one rank of a mesh with ulysses > 1: all-to-all, the ring's passes, all-to-all back.

The all-to-all within a ulysses group (`ulysses.py`) gives each rank all tokens of the group for its own heads. The
ring's passes then run between ranks that hold the same heads. Nothing here knows of processes, as in `passes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from longctx.attention.arguments import wrapped
from longctx.attention.backends.base import BackwardQueries, accumulator_dtype
from longctx.attention.heads import Share, assign_heads
from longctx.attention.hybrid.ulysses import KEYS, PER_TOKEN, QUERIES, HeadExchange, UlyssesGroup
from longctx.attention.operator_common import per_head
from longctx.attention.passes import Pair, Passes, split

Optional = torch.Tensor | None


@dataclass(frozen=True)
class Saved:
    """What backward needs: U * T tokens of this rank's own heads, key heads not expanded; or, before backward's
    all-to-all, T tokens of all heads (except lse, which never leaves its heads)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    documents: Optional
    out: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True)
class HybridPasses:
    """Forward and backward of one rank.

    passes: runs the ring of the ranks with the same heads. Its Scores still hold the ALiBi slopes and seeds of all
    heads, from which `_passes` selects this rank's. heads, kv_heads: of the whole model.
    """

    group: UlyssesGroup
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
    ) -> tuple[torch.Tensor, Optional, Saved]:
        """Return (out (B, H, T, Dv) in q's dtype, lse (B, H, T) if with_lse, what backward needs)."""
        share = self._share
        q, k, v, *ids = self._exchange.to_heads([(QUERIES, q), (KEYS, k), (KEYS, v), *_per_token(documents)])
        ids_or_none = ids[0] if ids else None
        own_sink = None if sink is None else sink[share.queries]
        out, lse = self._passes().forward(q, *expand(share, k, v), ids_or_none, own_sink)
        back = self._exchange.to_tokens([(QUERIES, out), *([(QUERIES, lse)] if with_lse else [])])
        return back[0], back[1] if with_lse else None, Saved(q, k, v, ids_or_none, out, lse)

    def gather(self, local: Saved, dout: torch.Tensor, dlse: Optional) -> tuple[Saved, torch.Tensor, Optional]:
        """Return (what backward needs, dout, dlse) after one all-to-all of all of them but lse."""
        ids = _per_token(local.documents)
        sent = [(QUERIES, dout), (QUERIES, local.q), (QUERIES, local.out), (KEYS, local.k), (KEYS, local.v), *ids]
        if dlse is not None:
            sent.append((QUERIES, dlse))
        dout, q, out, k, v, *rest = self._exchange.to_heads(sent)
        documents = rest[0] if ids else None
        return Saved(q, k, v, documents, out, local.lse), dout, None if dlse is None else rest[-1]

    def gather_gradients(self, dout: torch.Tensor, dlse: Optional) -> tuple[torch.Tensor, Optional]:
        """Return (dout, dlse) after the all-to-all."""
        dout, *rest = self._exchange.to_heads([(QUERIES, dout), *([] if dlse is None else [(QUERIES, dlse)])])
        return dout, rest[0] if rest else None

    def backward(
        self, saved: Saved, dout: torch.Tensor, dlse: Optional, sink: Optional = None, alibi: Optional = None
    ) -> tuple[torch.Tensor, ...]:
        """Return (dq, dk, dv) of this rank's tokens and (dsink, dalibi), each (H,): of this rank's heads over the whole
        group's tokens, zero for other heads, so that the sum over ranks is the gradient."""
        share = self._share
        queries = BackwardQueries(saved.q, saved.out, saved.lse, dout, dlse)
        k, v = expand(share, saved.k, saved.v)
        dq, dkv, dslopes = self._passes().backward(queries, k, v, saved.documents)
        dk, dv = sum_copies(share, split(dkv, k, v))
        dq, dk, dv = self._exchange.to_tokens([(QUERIES, dq), (KEYS, dk), (KEYS, dv)])
        own_sink, own_alibi = (None if x is None else x[share.queries] for x in (sink, alibi))
        found = per_head(queries, own_sink, own_alibi, dslopes)
        return dq, dk, dv, *(self._spread(x, like) for x, like in zip(found, (sink, alibi), strict=True))

    def _spread(self, own: torch.Tensor, like: Optional) -> torch.Tensor:
        """Return (H,) with this rank's heads' values and zeros elsewhere; `own`, which is empty, without that input."""
        if like is None:
            return own
        spread = torch.zeros_like(like)
        spread[self._share.queries] = own
        return spread

    @property
    def _share(self) -> Share:
        return assign_heads(self.heads, self.kv_heads, self.group.size)[self.group.rank]

    @property
    def _exchange(self) -> HeadExchange:
        return HeadExchange(self.group, assign_heads(self.heads, self.kv_heads, self.group.size))

    def _passes(self) -> Passes:
        """Return the ring's passes with the slopes and seeds of this rank's heads alone."""
        scores, queries = self.passes.scores, self._share.queries
        slopes = None if scores.alibi is None else scores.alibi[queries]
        seeds = None if scores.seeds is None else seeds_from(scores.seeds, queries.start)
        return replace(self.passes, scores=replace(scores, alibi=slopes, seeds=seeds))


def _per_token(documents: Optional) -> list[tuple[str, torch.Tensor]]:
    return [] if documents is None else [(PER_TOKEN, documents)]


def seeds_from(seeds: torch.Tensor, head: int) -> torch.Tensor:
    """Return (B,) seeds under which head 0 drops what `head` drops under `seeds`: kernels/flash/dropout.py adds a
    multiple of the head's number to a seed's upper half."""
    return seeds + wrapped(head * 0x9E3779B9 << 32)


def expand(share: Share, k: torch.Tensor, v: torch.Tensor) -> Pair:
    """Return keys and values such that each head serves equally many query heads, copying heads only if it must."""
    if share.expand is None:
        return k, v
    index = torch.tensor(share.expand, device=k.device)
    return k.index_select(1, index), v.index_select(1, index)


def sum_copies(share: Share, gradients: Pair) -> Pair:
    """Return the gradients of `expand`'s arguments: the copies' gradients, summed in fp32 or fp64."""
    if share.expand is None:
        return gradients
    index = torch.tensor(share.expand, device=gradients[0].device)
    totals = []
    for x in gradients:
        dtype = accumulator_dtype(x.dtype)
        total = x.new_zeros((x.shape[0], share.key_count, *x.shape[2:]), dtype=dtype)
        totals.append(total.index_add_(1, index, x.to(dtype)).to(x.dtype))
    return totals[0], totals[1]
