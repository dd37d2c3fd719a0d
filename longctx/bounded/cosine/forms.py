"""Cosine attention over a sequence that may lie on several ranks: causal, and over all tokens (bidirectional, cross).

The state is a sum, so ranks exchange one matrix a head, once each way. Packed or padded sequences first tell each other
how many tokens their documents have had, a number a row: the scale of a value depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from longctx.attention.backends.base import accumulator_dtype
from longctx.bounded.chunks import Runs
from longctx.bounded.cosine import chunks as cosine_chunks
from longctx.bounded.cosine.write import memory_of
from longctx.bounded.ranks import monoid
from longctx.bounded.ranks.exchange import Value, collect, one_each
from longctx.bounded.ranks.packed import each
from longctx.bounded.ranks.scan import begin_scan
from longctx.bounded.ranks.sequence import Place, check_one_document, only_document
from longctx.bounded.state import CosineState
from longctx.kernels.cosine.reference import unit

AHEAD = 1024
"""Tokens (at most a quarter) whose outputs a rank computes while states are on their way; what was before them is added
when it has come, one more product for these tokens. The others start from it."""


@dataclass(frozen=True)
class Inputs:
    """q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv), not normalised; exponent (H,) if on_query, else (G,);
    backend "chunked" or "triton", for causal attention."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    exponent: torch.Tensor
    on_query: bool
    backend: str

    @property
    def dtype(self) -> torch.dtype:
        return accumulator_dtype(self.q.dtype)

    def size(self, counts: torch.Tensor) -> torch.Tensor:
        """n^-a of counts (B or 1, T): (B, heads of the exponent, T)."""
        logs = counts.clamp_min(1).to(self.dtype).log()[:, None].expand(self.q.shape[0], -1, -1)
        return torch.exp(-self.exponent[:, None] * logs)

    def part(self, here: slice) -> Inputs:
        q, k, v = (x[:, :, here] for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v)

    def document(self, row: int, tokens: torch.Tensor) -> Inputs:
        """Some tokens (n,) of one row."""
        q, k, v = (x[row : row + 1].index_select(2, tokens) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v)

    def empty(self) -> torch.Tensor:
        shape = (*self.k.shape[:2], self.k.shape[3], self.v.shape[3])
        return torch.zeros(shape, dtype=self.dtype, device=self.k.device)


def causal(x: Inputs, place: Place, state: CosineState | None, total: bool) -> tuple[torch.Tensor, CosineState]:
    """(out (B, H, T, Dv), the state after the sequence's last token; on a ring only if `total`)."""
    ids, document = place.ids, None if state is None else state.document
    if ids is None and document is not None:
        document = document.clamp_min(0)
    counts, count = place.counts(None if state is None else state.count, document, total)
    size = x.size(counts)
    starts: list[Any] = [(x.empty() if state is None else state.memory, document)]
    parts, outs = list(place.parts), []
    if place.link.ring > 1:
        arriving = _begin(x, size, place, total)
        ahead = slice(0, min(AHEAD, parts[0].stop // 4))
        join = _ahead(x, size, ids, ahead)  # while the states are on their way
        starts = arriving() if state is None else [_after(state, place, start) for start in arriving()]
        starts = [(memory, monoid.name(before)) for memory, before in starts]
        if join is not None:
            out, start = join(starts[0])
            parts[0], starts = slice(ahead.stop, parts[0].stop), [start, *starts[1:]]
            outs.append(out)
    for here, (memory, before) in zip(parts, starts, strict=False):
        part = None if ids is None else ids[:, here]
        out, last = _continue(x.part(here), size[:, :, here], memory, part, None if part is None else before)
        outs.append(out)
    if place.link.ring > 1:
        last, end = starts[-1]
        document = document if ids is None else end
    elif ids is not None:
        document = Runs(ids, document).document
    after = CosineState(last, count.expand(x.q.shape[0]).clone(), document)
    return (outs[0] if len(outs) == 1 else torch.cat(outs, 2)), after


def _continue(x: Inputs, *given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """One stretch by the backend's kernels, from (size, memory, ids, document)."""
    if x.backend == "triton":
        from longctx.bounded.cosine.triton import Fused  # imports triton

        return Fused.apply(x.q, x.k, x.v, *given, x.on_query)
    return cosine_chunks.chunked(x.q, x.k, x.v, *given, x.on_query, cosine_chunks.CHUNK)[:2]


def _begin(x: Inputs, size: torch.Tensor, place: Place, total: bool) -> Callable[[], list[Value]]:
    """Start to fetch the state before each stretch of this rank, and after the last if `total`."""
    elements: list[Value] = []
    for here in place.parts:
        tokens, document = None, torch.zeros(x.k.shape[0], dtype=torch.int64, device=x.k.device)
        if place.ids is not None:
            runs = Runs(place.ids[:, here], None)
            tokens, document = runs.tail(), runs.ending
        scale = None if x.on_query else size[:, :, here]
        elements.append((memory_of(x.k[:, :, here], x.v[:, :, here], scale, tokens), document))
    nothing = (x.empty(), torch.full_like(elements[0][1], -1))
    return begin_scan(elements, monoid.add, nothing, place.link, place.chain, total=total)


def _after(state: CosineState, place: Place, start: Value) -> Value:
    """What was before the sequence joins last, on every rank."""
    same = torch.zeros_like(start[1]) if place.ids is None or state.document is None else state.document
    return monoid.add((state.memory, same), start)


def _ahead(
    x: Inputs, size: torch.Tensor, ids: torch.Tensor | None, here: slice
) -> Callable[[Value], tuple[torch.Tensor, Value]] | None:
    """The outputs of some tokens as if nothing were before them, in the accumulator's dtype, so that what is added
    later is rounded once; None for no tokens. Returns state before -> (out, state after): it adds Q S."""
    if here.stop == 0:
        return None
    part, scale = x.part(here), size[:, :, here]
    part = replace(part, q=part.q.to(x.dtype), k=part.k.to(x.dtype), v=part.v.to(x.dtype))
    own = None if ids is None else ids[:, here]
    out, memory = _continue(part, scale, x.empty(), own, None)
    document = torch.zeros_like(size[:, 0, 0], dtype=torch.int64) if own is None else Runs(own, None).ending

    def join(start: Value) -> tuple[torch.Tensor, Value]:
        q, groups = part.q, part.k.shape[1]
        if own is not None:
            q = q.masked_fill(~Runs(own, start[1]).before()[:, None, :, None], 0.0)
        past = (unit(q).unflatten(1, (groups, -1)).flatten(2, 3) @ start[0]).unflatten(2, (-1, here.stop)).flatten(1, 2)
        past = past * scale[..., None] if x.on_query else past
        after, document_after = monoid.add(start, (memory, document))
        return (out + past).to(x.q.dtype), (after, monoid.name(document_after))

    return join


def over_all(x: Inputs, place: Place, state: CosineState | None, total: bool) -> tuple[torch.Tensor, CosineState]:
    """Every query sees every key: N^-a (Q K^T) V, by whichever product is cheaper; the state only if `total`."""
    queries, tokens = x.q.shape[2], x.k.shape[2]
    absent = None
    if place.valid is not None and queries == tokens:
        absent = ~place.valid[:, None, :, None]
        x = replace(x, q=x.q.masked_fill(absent, 0.0))
    if state is None and not total and place.link.ring == 1 and _pairs_are_cheaper(x):
        memory, (out, count) = x.empty(), _by_pairs(x, place.valid)
    else:
        memory, count = memory_of(x.k, x.v, None, place.valid), _count(x, place.valid)
        if place.link.ring > 1:
            memory, count = _over_ranks(memory, count, place)
        if state is not None:
            memory, count = memory + state.memory, count + state.count
        out = _read(x, memory, count)
    if absent is not None:
        out = out.masked_fill(absent, 0.0)
    return out, CosineState(memory, count, None)


def packed(x: Inputs, place: Place) -> torch.Tensor:
    """As `over_all`, within each document of packed rows."""
    assert place.valid is not None
    absent = ~place.valid[:, None, :, None]
    clean = replace(x, q=x.q.masked_fill(absent, 0.0))

    def alone(here: slice, row: int, tokens: torch.Tensor) -> torch.Tensor:
        part = x.part(here).document(row, tokens)
        if _pairs_are_cheaper(part):
            return _by_pairs(part, None)[0]
        return _read(part, memory_of(part.k, part.v, None, None), _count(part, None))

    return each(
        place,
        lambda here, tokens, name: (memory_of(x.k[:, :, here], x.v[:, :, here], None, tokens), tokens.sum(1), name),
        monoid.add,
        lambda state: (*(torch.zeros_like(y) for y in state[:-1]), torch.full_like(state[-1], -1)),
        lambda here, state: _read(clean.part(here), state[0], state[1]),
        alone,
        x.q.new_zeros((1, x.q.shape[1], 1, x.v.shape[3])),
    )


def _count(x: Inputs, valid: torch.Tensor | None) -> torch.Tensor:
    """(B,) the keys that count."""
    if valid is not None:
        return valid.sum(1)
    return torch.full((x.k.shape[0],), x.k.shape[2], device=x.k.device)


def _read(x: Inputs, memory: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """All queries at once of one memory, to which `count` (B,) keys were written: (B, H, T, Dv)."""
    q = unit(x.q.to(x.dtype)).unflatten(1, (x.k.shape[1], -1)).flatten(2, 3)
    out = (q @ memory).unflatten(2, (-1, x.q.shape[2])).flatten(1, 2)
    return (out * x.size(count[:, None])[..., None]).to(x.q.dtype)


def _over_ranks(memory: torch.Tensor, total: torch.Tensor, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    ring = place.link.ring
    document = only_document(place.ids, total.shape[0], total.device)
    known, token = collect([(memory, total, document)], place.link, one_each(ring), lambda source, here: True)
    if place.ids is not None:
        check_one_document([known[rank][2] for rank in range(ring)])
    memories = [memory + token if rank == place.link.rank else known[rank][0] for rank in range(ring)]
    return torch.stack(memories).sum(0), torch.stack([known[rank][1] for rank in range(ring)]).sum(0)


def _pairs_are_cheaper(x: Inputs) -> bool:
    """Whether (Q K^T) V costs less than Q (K^T V)."""
    (heads, queries, width), tokens, out = x.q.shape[1:], x.k.shape[2], x.v.shape[3]
    return heads * queries * tokens * (width + out) < (x.k.shape[1] * tokens + heads * queries) * width * out


def _by_pairs(x: Inputs, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """((Q K^T over the pairs) V, the keys that count (B,))."""
    q, k, v = (y.to(x.dtype) for y in (x.q, x.k, x.v))
    if valid is not None:
        k, v = (y.masked_fill(~valid[:, None, :, None], 0.0) for y in (k, v))
    scores = unit(q).unflatten(1, (k.shape[1], -1)) @ unit(k).transpose(-1, -2)[:, :, None]
    count = _count(x, valid)
    out = (scores @ v[:, :, None]).flatten(1, 2) * x.size(count[:, None])[..., None]
    return out.to(x.q.dtype), count
