"""ABC's two forms over a sequence that may lie on several ranks: causal, and over all tokens (bidirectional, cross).

Across ranks the causal form is a scan: each rank tells what its stretch of tokens writes, receives what all before it
wrote, and goes on from there as from any other state. With the prefix normaliser that is one exchange each way; the
running one needs the log masses first, since a token's weight depends on all mass before it: two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch.nn import functional

from longctx.attention.backends.base import accumulator_dtype
from longctx.bounded.abc import chunks as abc_chunks
from longctx.bounded.abc.write import memory_of
from longctx.bounded.chunks import Runs
from longctx.bounded.ranks import monoid
from longctx.bounded.ranks.exchange import Operation, Value, collect, one_each
from longctx.bounded.ranks.packed import each
from longctx.bounded.ranks.scan import associative_exclusive_scan
from longctx.bounded.ranks.sequence import Place, check_one_document, only_document
from longctx.bounded.state import ABCState


@dataclass(frozen=True)
class Inputs:
    """q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv); the control of keys (B, G, T, M), that of values or None if it
    is the same one; normalizer prefix, running or sum; scale of the logits; backend chunked or triton, if causal."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor | None
    normalizer: str
    scale: float
    backend: str = "chunked"

    def part(self, here: slice) -> Inputs:
        q, k, v, key = (x[:, :, here] for x in (self.q, self.k, self.v, self.key))
        value = None if self.value is None else self.value[:, :, here]
        return replace(self, q=q, k=k, v=v, key=key, value=value)

    def document(self, row: int, tokens: torch.Tensor) -> Inputs:
        """Some tokens (n,) of one row."""
        q, k, v, key = (x[row : row + 1].index_select(2, tokens) for x in (self.q, self.k, self.v, self.key))
        value = None if self.value is None else self.value[row : row + 1].index_select(2, tokens)
        return replace(self, q=q, k=k, v=v, key=key, value=value)

    @property
    def dtype(self) -> torch.dtype:
        return accumulator_dtype(self.q.dtype)

    def empty(self) -> ABCState:
        """The memory nobody has written to."""
        shape = (self.k.shape[0], self.k.shape[1], self.key.shape[3])
        mass = torch.full(shape, -torch.inf, dtype=self.dtype, device=self.k.device)
        keys, values = (mass.new_zeros((*shape, x.shape[3])) for x in (self.k, self.v))
        return ABCState(mass, keys, values, None, None if self.value is None else mass.clone())


def causal(x: Inputs, place: Place, state: ABCState | None, total: bool) -> tuple[torch.Tensor, ABCState]:
    """(out (B, H, T, Dv), the state after the sequence's last token; on a ring only if `total`)."""
    starts = [x.empty() if state is None else state]
    if place.link.ring > 1:
        starts = (_running_starts if x.normalizer == "running" else _starts)(x, place, state, total)
    outs, last = [], starts[0]
    for here, start in zip(place.parts, starts, strict=False):
        out, last = _continue(x.part(here) if len(place.parts) > 1 else x, _ids(place, here), start)
        outs.append(out)
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
    if place.link.ring == 1:
        return out, last
    last = starts[-1]
    if place.ids is None and state is not None and state.document is not None:
        last = replace(last, document=state.document.clamp_min(0))
    return out, last


def over_all(x: Inputs, place: Place, state: ABCState | None) -> tuple[torch.Tensor, ABCState]:
    """Every query reads the memory of all tokens, and of `state`: (out, the state)."""
    whole = _element(x, place.valid, only_document(place.ids, x.k.shape[0], x.k.device))
    if place.link.ring > 1:
        known, token = collect([whole], place.link, one_each(place.link.ring), lambda source, here: True)
        known[place.link.rank] = (whole[0] + token, *whole[1:])  # ties an output to the exchange, for its backward
        if place.ids is not None:
            check_one_document([known[rank][-1] for rank in range(place.link.ring)])
        whole = reduce(_operation(x), (known[rank] for rank in range(place.link.ring)))
    if state is not None:
        whole = _operation(x)(_as_value(state, whole[-1]), whole)
    found = _as_state(whole, x, None)
    if place.valid is None or place.valid.shape[1] != x.q.shape[2]:
        return _read(x, found), found
    absent = ~place.valid[:, None, :, None]
    return _read(replace(x, q=x.q.masked_fill(absent, 0.0)), found).masked_fill(absent, 0.0), found


def packed(x: Inputs, place: Place) -> torch.Tensor:
    """As `over_all`, within each document of packed rows."""
    clean = x
    if place.valid is not None:
        clean = replace(x, q=x.q.masked_fill(~place.valid[:, None, :, None], 0.0))

    def alone(here: slice, row: int, tokens: torch.Tensor) -> torch.Tensor:
        part = x.part(here).document(row, tokens)
        document = torch.zeros(1, dtype=torch.int64, device=x.k.device)
        return _read(part, _as_state(_element(part, None, document), part, None))

    return each(
        place,
        lambda here, tokens, document: _element(x.part(here), tokens, document),
        _operation(x),
        _nothing,
        lambda here, state: _read(clean.part(here), _as_state(state, x, None)),
        alone,
        x.q.new_zeros((1, x.q.shape[1], 1, x.v.shape[3])),
    )


def _continue(x: Inputs, ids: torch.Tensor | None, start: ABCState) -> tuple[torch.Tensor, ABCState]:
    document = start.document
    if ids is None and document is not None:  # no ids: all tokens go on with the state's document
        document = document.clamp_min(0)
    after = document if ids is None else Runs(ids, document).document
    if x.backend == "triton":
        from longctx.bounded.abc.triton import Fused  # imports triton

        out, mass, keys, values = Fused.apply(
            x.q, x.k, x.v, x.key, start.log_mass, start.keys, start.values, ids, document, x.scale
        )
        return out, ABCState(mass, keys, values, after, None)
    out, mass, value_mass, keys, values = abc_chunks.Chunked.apply(
        x.q, x.k, x.v, x.key, x.value, start.log_mass, start.value_log_mass, start.keys, start.values, ids,
        document, x.normalizer, x.scale, abc_chunks.CHUNK,
    )  # fmt: skip
    return out, ABCState(mass, keys, values, after, value_mass)


def _ids(place: Place, here: slice) -> torch.Tensor | None:
    return None if place.ids is None else place.ids[:, here]


def _tail(x: Inputs, ids: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(which tokens are of the stretch's last document (B, T) or None, that document (B,) as monoid.py names it)."""
    if ids is None:
        return None, torch.zeros(x.k.shape[0], dtype=torch.int64, device=x.k.device)
    runs = Runs(ids, None)
    return runs.tail(), runs.ending


def _element(x: Inputs, tokens: torch.Tensor | None, document: torch.Tensor) -> Value:
    """What a stretch leaves, as the monoid takes it: (z, memory)s and the document. Shared controls travel once."""
    mean = x.normalizer != "sum"
    if x.value is not None:
        for_keys = memory_of((x.k,), x.key, normalized=mean, tokens=tokens)
        return *for_keys, *memory_of((x.v,), x.value, normalized=mean, tokens=tokens), document
    mass, keys, values = memory_of((x.k, x.v), x.key, normalized=mean, tokens=tokens)
    return mass, torch.cat([keys, values], -1), document


def _operation(x: Inputs) -> Operation:
    return monoid.total if x.normalizer == "sum" else monoid.average


def _as_state(value: Value, x: Inputs, document: torch.Tensor | None) -> ABCState:
    if len(value) == 5:
        return ABCState(value[0], value[1], value[3], document, value[2])
    keys, values = value[1].split([x.k.shape[3], x.v.shape[3]], -1)
    return ABCState(value[0], keys, values, document, None)


def _as_value(state: ABCState, document: torch.Tensor) -> Value:
    if state.value_log_mass is not None:
        return state.log_mass, state.keys, state.value_log_mass, state.values, document
    return state.log_mass, torch.cat([state.keys, state.values], -1), document


def _nothing(value: Value) -> Value:
    """The identity of the monoids, in the shapes of `value`."""
    fills = [-torch.inf if x.dim() == 3 else 0.0 for x in value[:-1]]
    return *(torch.full_like(x, fill) for x, fill in zip(value, fills, strict=False)), torch.full_like(value[-1], -1)


def _starts(x: Inputs, place: Place, state: ABCState | None, total: bool) -> list[ABCState]:
    """The state before each stretch of this rank, and after the last if `total`, for memories that can be joined
    afterwards. What was before the sequence joins last, on every rank."""
    elements = []
    for here in place.parts:
        part = x.part(here)
        elements.append(_element(part, *_tail(part, _ids(place, here))))
    op = _operation(x)
    before = associative_exclusive_scan(elements, op, _nothing(elements[0]), place.link, place.chain, total=total)
    if state is not None:
        first = _as_value(state, _document(state, place))
        before = [op(first, value) for value in before]
    return [_as_state(value, x, None if place.ids is None else monoid.name(value[-1])) for value in before]


def _document(state: ABCState, place: Place) -> torch.Tensor:
    """The document of the state as the chunks' states name theirs: without ids all tokens go on with it."""
    if place.ids is None or state.document is None:
        return torch.zeros(state.log_mass.shape[0], dtype=torch.int64, device=state.log_mass.device)
    return state.document


def _running_starts(x: Inputs, place: Place, state: ABCState | None, total: bool) -> list[ABCState]:
    """As `_starts`, where weights depend on the mass before: first the masses, then the memories."""
    parts = [x.part(here) for here in place.parts]
    tails = [_tail(part, _ids(place, here)) for part, here in zip(parts, place.parts, strict=True)]
    masses: list[Value] = []
    for part, (tokens, document) in zip(parts, tails, strict=True):
        logits = (part.key,) if part.value is None else (part.key, part.value)
        masses.append((*(memory_of((), s, tokens=tokens)[0] for s in logits), document))
    ring = place.link, place.chain
    before = associative_exclusive_scan(masses, monoid.add_mass, _nothing(masses[0]), *ring, total=total)
    if state is not None:
        own = (state.log_mass,) if state.value_log_mass is None else (state.log_mass, state.value_log_mass)
        before = [monoid.add_mass((*own, _document(state, place)), mass) for mass in before]
    starts: list[ABCState] = []
    empty = x.empty()
    for mass in before:
        named = None if place.ids is None else monoid.name(mass[-1])
        starts.append(ABCState(mass[0], empty.keys, empty.values, named, mass[1] if len(mass) > 2 else None))
    sums: list[Value] = []
    for part, here, start, (_, document) in zip(parts, place.parts, starts, tails, strict=False):
        after = _continue(part, _ids(place, here), start)[1]
        sums.append((torch.cat([after.keys, after.values], -1), document))
    memories = associative_exclusive_scan(sums, monoid.add, _nothing(sums[0]), *ring, total=total)
    if state is not None:
        first = (torch.cat([state.keys, state.values], -1), _document(state, place))
        memories = [monoid.add(first, memory) for memory in memories]
    found = []
    for start, (memory, _) in zip(starts, memories, strict=True):
        keys, values = memory.split([x.k.shape[3], x.v.shape[3]], -1)
        found.append(replace(start, keys=keys, values=values))
    return found


def _read(x: Inputs, state: ABCState) -> torch.Tensor:
    """Softmax over the slots, all queries at once: (B, H, T, Dv)."""
    q = x.q.to(x.dtype).unflatten(1, (x.k.shape[1], -1)).flatten(2, 3)
    written, mask = state.log_mass > -torch.inf, None
    if not bool(written.all()):
        mask = (written | ~written.any(-1, keepdim=True))[:, :, None]
    out = functional.scaled_dot_product_attention(q, state.keys, state.values, attn_mask=mask, scale=x.scale)
    if mask is not None:
        out = out * written.any(-1)[:, :, None, None]
    return out.unflatten(2, (-1, x.q.shape[2])).flatten(1, 2).to(x.q.dtype)
