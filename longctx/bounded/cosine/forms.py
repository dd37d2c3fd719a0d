"""Cosine attention over a sequence on one or several ranks: causal, and over all tokens (bidirectional, cross).

The state is a sum, so ranks exchange one matrix per head in forward and one in backward. Packed or padded sequences
first exchange the token count of the document that crosses a border, one number per row: values are scaled by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from longctx.bounded import walk
from longctx.bounded.chunks import Runs
from longctx.bounded.cosine import chunks as cosine_chunks
from longctx.bounded.cosine.write import write_state
from longctx.bounded.inputs import SequenceInputs
from longctx.bounded.ranks import monoid, whole
from longctx.bounded.ranks.exchange import Value
from longctx.bounded.ranks.scan import begin_scan
from longctx.bounded.ranks.sequence import LocalTokens
from longctx.bounded.state import CosineState
from longctx.kernels.cosine.reference import unit

AHEAD = 1024
"""Tokens (at most a quarter of a stretch) whose outputs a rank computes while states are in flight. When the state
before them arrives, one more product adds what they read of it; the other tokens start from it."""


@dataclass(frozen=True)
class CosineInputs(SequenceInputs):
    """The inputs of one call; q and k are not normalised.

    exponent: a, (H,) if on_query, else (G,). backend: "chunked" or "triton", if causal.

    Without `causal` a state `Value` is (S, the number of keys (B,), document).
    """

    exponent: torch.Tensor
    on_query: bool
    backend: str

    def size(self, counts: torch.Tensor) -> torch.Tensor:
        """Return n^-a of counts n (B or 1, T): (B, heads of the exponent, T)."""
        logs = counts.clamp_min(1).to(self.dtype).log()[:, None].expand(self.q.shape[0], -1, -1)
        return torch.exp(-self.exponent[:, None] * logs)

    def empty(self) -> torch.Tensor:
        """Return S before any token."""
        shape = (*self.k.shape[:2], self.k.shape[3], self.v.shape[3])
        return torch.zeros(shape, dtype=self.dtype, device=self.k.device)

    def write(self, tokens: torch.Tensor | None, document: torch.Tensor) -> Value:
        return write_state(self.k, self.v, None, tokens), self.key_count(tokens), document

    def combine(self, first: Value, second: Value) -> Value:
        return monoid.add(first, second)

    def read(self, state: Value) -> torch.Tensor:
        q = unit(self.q.to(self.dtype)).unflatten(1, (self.k.shape[1], -1)).flatten(2, 3)
        out = (q @ state[0]).unflatten(2, (-1, self.q.shape[2])).flatten(1, 2)
        return (out * self.size(state[1][:, None])[..., None]).to(self.q.dtype)

    def attend_all(self) -> torch.Tensor:
        return _by_pairs(self, None) if _pairs_are_cheaper(self) else super().attend_all()

    def key_count(self, valid: torch.Tensor | None) -> torch.Tensor:
        """Return the number of valid keys, (B,)."""
        if valid is not None:
            return valid.sum(1)
        return torch.full((self.k.shape[0],), self.k.shape[2], device=self.k.device)


def causal(
    x: CosineInputs, local: LocalTokens, state: CosineState | None, total: bool
) -> tuple[torch.Tensor, CosineState]:
    """Return out (B, H, T, Dv) and the state after the sequence's last token, on a ring only if `total`."""
    ids, document = local.ids, None if state is None else state.document
    if ids is None and document is not None:
        document = document.clamp_min(0)
    counts, count = local.counts(None if state is None else state.count, document, total)
    size = x.size(counts)
    starts: list[Any] = [(x.empty() if state is None else state.memory, document)]
    parts, outs = list(local.parts), []
    if local.link.ring > 1:
        finish = _begin(x, size, local, total)
        ahead = slice(0, min(AHEAD, parts[0].stop // 4))
        join = _ahead(x, size, ids, ahead)  # overlaps with the exchange
        starts = finish() if state is None else [_after(state, local, start) for start in finish()]
        starts = [(memory, monoid.name(before)) for memory, before in starts]
        if join is not None:
            out, start = join(starts[0])
            parts[0], starts = slice(ahead.stop, parts[0].stop), [start, *starts[1:]]
            outs.append(out)
    for here, (memory, before) in zip(parts, starts, strict=False):
        part = local.ids_of(here)
        out, last = _stretch(x.part(here), size[:, :, here], memory, part, None if part is None else before)
        outs.append(out)
    if local.link.ring > 1:
        last, end = starts[-1]
        document = document if ids is None else end
    elif ids is not None:
        document = Runs(ids, document).document
    after = CosineState(last, count.expand(x.q.shape[0]).clone(), document)
    return (outs[0] if len(outs) == 1 else torch.cat(outs, 2)), after


def _stretch(x: CosineInputs, *given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute one stretch by the backend's kernels, given its size, state before, ids and document before."""
    if x.backend == "triton":
        from longctx.bounded.cosine.triton import FusedCosine  # imports triton

        return FusedCosine.apply(x.on_query, x.q, x.k, x.v, *given)
    out, after, _ = cosine_chunks.chunked(x.q, x.k, x.v, *given, on_query=x.on_query, chunk=walk.CHUNK)
    return out, after


def _begin(x: CosineInputs, size: torch.Tensor, local: LocalTokens, total: bool) -> Callable[[], list[Value]]:
    """Start to fetch the state before each stretch of this rank, and after the last if `total`."""
    elements: list[Value] = []
    for here in local.parts:
        tokens, document = local.tail(here, x.k.shape[0])
        scale = None if x.on_query else size[:, :, here]
        elements.append((write_state(x.k[:, :, here], x.v[:, :, here], scale, tokens), document))
    return begin_scan(elements, monoid.add, monoid.identity(elements[0]), local.link, local.stretches, total=total)


def _after(state: CosineState, local: LocalTokens, start: Value) -> Value:
    """Add the state before the sequence; every rank does so last."""
    return monoid.add((state.memory, local.document_before(state.document, len(start[1]))), start)


def _ahead(
    x: CosineInputs, size: torch.Tensor, ids: torch.Tensor | None, here: slice
) -> Callable[[Value], tuple[torch.Tensor, Value]] | None:
    """Compute the outputs of some tokens as if the sequence began with them; None for no tokens.

    Returns:
        A function from the state before to (out, state after), which adds Q S. The sum is in the accumulator's dtype
        and is rounded once.
    """
    if here.stop == 0:
        return None
    part, scale = x.part(here), size[:, :, here]
    part = replace(part, q=part.q.to(x.dtype), k=part.k.to(x.dtype), v=part.v.to(x.dtype))
    own = None if ids is None else ids[:, here]
    out, memory = _stretch(part, scale, x.empty(), own, None)
    document = torch.zeros_like(size[:, 0, 0], dtype=torch.int64) if own is None else Runs(own, None).ending

    def join(start: Value) -> tuple[torch.Tensor, Value]:
        q, groups = part.q, part.k.shape[1]
        if own is not None:  # only tokens that continue the document of the state read it
            q = q.masked_fill(~Runs(own, start[1]).before()[:, None, :, None], 0.0)
        past = (unit(q).unflatten(1, (groups, -1)).flatten(2, 3) @ start[0]).unflatten(2, (-1, here.stop)).flatten(1, 2)
        past = past * scale[..., None] if x.on_query else past
        after, document_after = monoid.add(start, (memory, document))
        return (out + past).to(x.q.dtype), (after, monoid.name(document_after))

    return join


def over_all(
    x: CosineInputs, local: LocalTokens, state: CosineState | None, total: bool
) -> tuple[torch.Tensor, CosineState | None]:
    """Compute N^-a (Q K^T) V over all N keys, by whichever product is cheaper.

    Returns:
        out (B, H, T, Dv), and the state if `total`; else it may be None.
    """
    if state is None and not total and local.link.ring == 1 and _pairs_are_cheaper(x):
        if local.valid is None or x.q.shape[2] != x.k.shape[2]:
            return _by_pairs(x, local.valid), None
        out = _by_pairs(x.clear_queries(local.valid), local.valid)
        return out.masked_fill(~local.valid[:, None, :, None], 0.0), None
    out, after = whole.over_all(x, local, None if state is None else (state.memory, state.count))
    return out, CosineState(after[0], after[1], None)


def _pairs_are_cheaper(x: CosineInputs) -> bool:
    """Return whether (Q K^T) V costs less than Q (K^T V)."""
    (heads, queries, width), tokens, out = x.q.shape[1:], x.k.shape[2], x.v.shape[3]
    return heads * queries * tokens * (width + out) < (x.k.shape[1] * tokens + heads * queries) * width * out


def _by_pairs(x: CosineInputs, valid: torch.Tensor | None) -> torch.Tensor:
    """Return N^-a (Q K^T) V by its scores."""
    q, k, v = (y.to(x.dtype) for y in (x.q, x.k, x.v))
    if valid is not None:
        k, v = (y.masked_fill(~valid[:, None, :, None], 0.0) for y in (k, v))
    scores = unit(q).unflatten(1, (k.shape[1], -1)) @ unit(k).transpose(-1, -2)[:, :, None]
    out = (scores @ v[:, :, None]).flatten(1, 2) * x.size(x.key_count(valid)[:, None])[..., None]
    return out.to(x.q.dtype)
