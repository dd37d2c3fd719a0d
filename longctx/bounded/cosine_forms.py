"""Cosine attention over a sequence that may lie on several ranks: causal, and over all tokens (bidirectional, cross).

The state is a sum, so ranks exchange one matrix a head, once each way. Packed or padded sequences first tell each other
how many tokens their documents have had, a number a row: the scale of a value depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from longctx.attention.backends.base import accumulator_dtype
from longctx.bounded import cosine_chunks, monoid
from longctx.bounded.chunks import Runs
from longctx.bounded.cosine_write import memory_of
from longctx.bounded.exchange import Value, collect, one_each
from longctx.bounded.scan import associative_exclusive_scan
from longctx.bounded.sequence import Place, check_one_document, only_document
from longctx.bounded.state import CosineState
from longctx.kernels.cosine.reference import unit


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

    def empty(self) -> torch.Tensor:
        shape = (*self.k.shape[:2], self.k.shape[3], self.v.shape[3])
        return torch.zeros(shape, dtype=self.dtype, device=self.k.device)


def causal(x: Inputs, place: Place, state: CosineState | None) -> tuple[torch.Tensor, CosineState]:
    """(out (B, H, T, Dv), the state after this rank's last stretch)."""
    ids, document = place.ids, None if state is None else state.document
    if ids is None and document is not None:
        document = document.clamp_min(0)
    counts = place.counts(None if state is None else state.count, document)
    size = x.size(counts)
    memories: Sequence[torch.Tensor] = [x.empty() if state is None else state.memory]
    known: Sequence[torch.Tensor | None] = [document]
    if place.link.ring > 1:
        memories, known = zip(*_starts(x, size, place), strict=True)
    outs = []
    for here, memory, before in zip(place.parts, memories, known, strict=True):
        q, k, v = (y[:, :, here] for y in (x.q, x.k, x.v))
        part = None if ids is None else ids[:, here]
        out, last = _continue(x, q, k, v, size[:, :, here], memory, part, None if part is None else before)
        outs.append(out)
    if ids is not None:
        document = Runs(ids, document).document
    after = CosineState(last, counts[:, -1].expand(x.q.shape[0]).clone(), document)
    return (outs[0] if len(outs) == 1 else torch.cat(outs, 2)), after


def _continue(x: Inputs, *given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """One stretch by the backend's kernels."""
    if x.backend == "triton":
        from longctx.bounded.cosine_triton import Fused  # imports triton

        return Fused.apply(*given, x.on_query)
    return cosine_chunks.Chunked.apply(*given, x.on_query, cosine_chunks.CHUNK)


def _starts(x: Inputs, size: torch.Tensor, place: Place) -> list[Value]:
    """The state before each stretch of this rank."""
    elements: list[Value] = []
    for here in place.parts:
        tokens, document = None, torch.zeros(x.k.shape[0], dtype=torch.int64, device=x.k.device)
        if place.ids is not None:
            runs = Runs(place.ids[:, here], None)
            tokens, document = runs.tail(), runs.document
        scale = None if x.on_query else size[:, :, here]
        elements.append((memory_of(x.k[:, :, here], x.v[:, :, here], scale, tokens), document))
    nothing = (x.empty(), torch.full_like(elements[0][1], -1))
    return associative_exclusive_scan(elements, monoid.add, nothing, place.link, place.chain)


def over_all(x: Inputs, place: Place, state: CosineState | None) -> tuple[torch.Tensor, CosineState]:
    """Every query sees every key of its document: N^-a (Q K^T) V, by whichever product is cheaper."""
    batch, queries, tokens = x.q.shape[0], x.q.shape[2], x.k.shape[2]
    absent = None
    if place.valid is not None and queries == tokens:
        absent = ~place.valid[:, None, :, None]
        x = replace(x, q=x.q.masked_fill(absent, 0.0))
    if state is None and place.link.ring == 1 and _pairs_are_cheaper(x, place):
        memory, out, total = x.empty(), *_by_pairs(x, place)
    else:
        total = torch.full((batch,), tokens, device=x.q.device)
        total = total if place.valid is None else place.valid.sum(1)
        memory = memory_of(x.k, x.v, None, place.valid)
        if place.link.ring > 1:
            memory, total = _over_ranks(memory, total, place)
        if state is not None:
            memory, total = memory + state.memory, total + state.count
        q = unit(x.q.to(x.dtype)).unflatten(1, (x.k.shape[1], -1)).flatten(2, 3)
        out = (q @ memory).unflatten(2, (-1, queries)).flatten(1, 2)
        total = total[:, None]
    out = out * x.size(total)[..., None]
    if absent is not None:
        out = out.masked_fill(absent, 0.0)
    return out.to(x.q.dtype), CosineState(memory, total.amax(1), None)


def _over_ranks(memory: torch.Tensor, total: torch.Tensor, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    ring = place.link.ring
    document = only_document(place.ids, total.shape[0], total.device)
    known, token = collect([(memory, total, document)], place.link, one_each(ring), lambda source, here: True)
    if place.ids is not None:
        check_one_document([known[rank][2] for rank in range(ring)])
    memories = [memory + token if rank == place.link.rank else known[rank][0] for rank in range(ring)]
    return torch.stack(memories).sum(0), torch.stack([known[rank][1] for rank in range(ring)]).sum(0)


def _pairs_are_cheaper(x: Inputs, place: Place) -> bool:
    """Whether (Q K^T) V costs less than Q (K^T V); packed documents have no common K^T V."""
    if place.ids is not None:
        top = place.ids.amax(1, keepdim=True)
        if bool(((place.ids >= 0) & (place.ids != top)).any()):
            return True
    (heads, queries, width), tokens, out = x.q.shape[1:], x.k.shape[2], x.v.shape[3]
    return heads * queries * tokens * (width + out) < (x.k.shape[1] * tokens + heads * queries) * width * out


def _by_pairs(x: Inputs, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """((Q K^T over pairs of one document) V, the size of each query's document (B, Tq))."""
    q, k, v = (y.to(x.dtype) for y in (x.q, x.k, x.v))
    visible = None
    if place.ids is not None:
        valid = place.ids >= 0
        k, v = (y.masked_fill(~valid[:, None, :, None], 0.0) for y in (k, v))
        if q.shape[2] == k.shape[2]:
            visible = (place.ids[:, :, None] == place.ids[:, None]) & valid[:, None]
        else:
            visible = valid[:, None].expand(-1, q.shape[2], -1)
    scores = unit(q).unflatten(1, (k.shape[1], -1)) @ unit(k).transpose(-1, -2)[:, :, None]
    total = torch.full((q.shape[0], 1), k.shape[2], device=q.device)
    if visible is not None:
        scores = scores * visible[:, None, None]
        total = visible.sum(-1)
    return (scores @ v[:, :, None]).flatten(1, 2), total
