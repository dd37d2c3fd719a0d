"""ABC's two forms over a sequence on one or several ranks: causal, and over all tokens (bidirectional, cross).

Across ranks the causal form is a scan: each rank sends the state that its stretch of tokens writes, receives the state
of all tokens before it, and continues from there as from any other state. With the prefix normalizer that is one
exchange in forward and one in backward. With the running normalizer it is two, since a token's weight depends on all
mass before it: first the log masses, then the states.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.nn import functional

from longctx.bounded import walk
from longctx.bounded.abc.chunks import ABCTensors, Chunked, ChunkSettings
from longctx.bounded.abc.weights import Normalizer
from longctx.bounded.abc.write import write_slots
from longctx.bounded.chunks import Runs
from longctx.bounded.inputs import SequenceInputs
from longctx.bounded.ranks import monoid, whole
from longctx.bounded.ranks.exchange import Value
from longctx.bounded.ranks.scan import associative_exclusive_scan
from longctx.bounded.ranks.sequence import LocalTokens
from longctx.bounded.state import ABCState


@dataclass(frozen=True)
class ABCInputs(SequenceInputs):
    """The inputs of one call.

    s_k, s_v: the controls of keys and of values, (B, G, T, M); s_v is None if both share s_k.
    normalizer: as in weights.py. scale: of the logits that read the slots. backend: "chunked" or "triton", if causal.

    A state `Value` is (z, keys and values side by side, document), or (z, keys, z, values, document) with two controls.
    """

    per_token: ClassVar[tuple[str, ...]] = ("q", "k", "v", "s_k", "s_v")

    s_k: torch.Tensor
    s_v: torch.Tensor | None
    normalizer: Normalizer
    scale: float
    backend: str = "chunked"

    @property
    def controls(self) -> tuple[torch.Tensor, ...]:
        return (self.s_k,) if self.s_v is None else (self.s_k, self.s_v)

    def empty(self) -> ABCState:
        """Return the state to which nothing was written."""
        shape = (self.k.shape[0], self.k.shape[1], self.s_k.shape[3])
        mass = torch.full(shape, -torch.inf, dtype=self.dtype, device=self.k.device)
        keys, values = (mass.new_zeros((*shape, x.shape[3])) for x in (self.k, self.v))
        return ABCState(mass, keys, values, None, None if self.s_v is None else mass.clone())

    def write(self, tokens: torch.Tensor | None, document: torch.Tensor) -> Value:
        mean = self.normalizer != Normalizer.SUM
        if self.s_v is not None:
            for_keys = write_slots((self.k,), self.s_k, normalized=mean, tokens=tokens)
            return *for_keys, *write_slots((self.v,), self.s_v, normalized=mean, tokens=tokens), document
        mass, keys, values = write_slots((self.k, self.v), self.s_k, normalized=mean, tokens=tokens)
        return mass, torch.cat([keys, values], -1), document

    def combine(self, first: Value, second: Value) -> Value:
        return (monoid.total if self.normalizer == Normalizer.SUM else monoid.average)(first, second)

    def read(self, state: Value) -> torch.Tensor:
        return self._read(self.to_state(state, None))

    def _read(self, state: ABCState) -> torch.Tensor:
        q = self.q.to(self.dtype).unflatten(1, (self.k.shape[1], -1)).flatten(2, 3)
        # Empty slots are masked. A row without any slot reads all of them, so no softmax is NaN, and is zeroed then.
        written, mask = state.log_mass > -torch.inf, None
        if not bool(written.all()):
            mask = (written | ~written.any(-1, keepdim=True))[:, :, None]
        out = functional.scaled_dot_product_attention(q, state.keys, state.values, attn_mask=mask, scale=self.scale)
        if mask is not None:
            out = out * written.any(-1)[:, :, None, None]
        return out.unflatten(2, (-1, self.q.shape[2])).flatten(1, 2).to(self.q.dtype)

    def split(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split (..., D + Dv) into keys and values."""
        keys, values = both.split([self.k.shape[3], self.v.shape[3]], -1)
        return keys, values

    def to_state(self, value: Value, document: torch.Tensor | None) -> ABCState:
        if self.s_v is not None:
            return ABCState(value[0], value[1], value[3], document, value[2])
        return ABCState(value[0], *self.split(value[1]), document, None)


def to_value(state: ABCState) -> Value:
    """Return a state as a `Value` without its document."""
    if state.value_log_mass is not None:
        return state.log_mass, state.keys, state.value_log_mass, state.values
    return state.log_mass, torch.cat([state.keys, state.values], -1)


def causal(x: ABCInputs, local: LocalTokens, state: ABCState | None, total: bool) -> tuple[torch.Tensor, ABCState]:
    """Return out (B, H, T, Dv) and the state after the sequence's last token, on a ring only if `total`."""
    starts = [x.empty() if state is None else state]
    if local.link.ring > 1:
        starts = (_running_starts if x.normalizer == Normalizer.RUNNING else _starts)(x, local, state, total)
    outs, last = [], starts[0]
    for here, start in zip(local.parts, starts, strict=False):
        out, last = _stretch(x.part(here) if len(local.parts) > 1 else x, local.ids_of(here), start)
        outs.append(out)
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
    if local.link.ring == 1:
        return out, last
    last = starts[-1]
    if local.ids is None and state is not None and state.document is not None:
        last = replace(last, document=state.document.clamp_min(0))
    return out, last


def over_all(x: ABCInputs, local: LocalTokens, state: ABCState | None) -> tuple[torch.Tensor, ABCState]:
    """Let every query read the state of all tokens, and of `state`: (out, the state)."""
    out, after = whole.over_all(x, local, None if state is None else to_value(state))
    return out, x.to_state(after, None)


def _stretch(x: ABCInputs, ids: torch.Tensor | None, start: ABCState) -> tuple[torch.Tensor, ABCState]:
    """Compute one stretch from the state before it by the backend's kernels."""
    document = start.document
    if ids is None and document is not None:  # without ids all tokens continue the state's document
        document = document.clamp_min(0)
    after = document if ids is None else Runs(ids, document).document
    tensors = ABCTensors(
        x.q, x.k, x.v, x.s_k, x.s_v, start.log_mass, start.value_log_mass, start.keys, start.values, ids, document
    )
    if x.backend == "triton":
        from longctx.bounded.abc.triton import FusedABC  # imports triton

        out, mass, keys, values = FusedABC.apply(x.scale, *tensors)
        return out, ABCState(mass, keys, values, after, None)
    settings = ChunkSettings(x.normalizer, x.scale, walk.CHUNK)
    out, mass, value_mass, keys, values = Chunked.apply(settings, *tensors)
    return out, ABCState(mass, keys, values, after, value_mass)


def _starts(x: ABCInputs, local: LocalTokens, state: ABCState | None, total: bool) -> list[ABCState]:
    """Return the state before each stretch of this rank, and after the last if `total`.

    For normalizers whose states combine after the fact. Every rank adds the state before the sequence last.
    """
    batch = x.k.shape[0]
    elements = [x.part(here).write(*local.tail(here, batch)) for here in local.parts]
    nothing = monoid.identity(elements[0])
    before = associative_exclusive_scan(elements, x.combine, nothing, local.link, local.stretches, total=total)
    if state is not None:
        first = (*to_value(state), local.document_before(state.document, batch))
        before = [x.combine(first, value) for value in before]
    return [x.to_state(value, None if local.ids is None else monoid.name(value[-1])) for value in before]


def _running_starts(x: ABCInputs, local: LocalTokens, state: ABCState | None, total: bool) -> list[ABCState]:
    """Do the same for the running normalizer, where weights depend on all mass before: two scans."""
    batch, ring = x.k.shape[0], (local.link, local.stretches)
    parts = [x.part(here) for here in local.parts]
    tails = [local.tail(here, batch) for here in local.parts]
    # First the log masses.
    masses: list[Value] = []
    for part, (tokens, document) in zip(parts, tails, strict=True):
        masses.append((*(write_slots((), s, tokens=tokens)[0] for s in part.controls), document))
    before = associative_exclusive_scan(masses, monoid.add_mass, monoid.identity(masses[0]), *ring, total=total)
    if state is not None:
        own = (state.log_mass,) if state.value_log_mass is None else (state.log_mass, state.value_log_mass)
        first = (*own, local.document_before(state.document, batch))
        before = [monoid.add_mass(first, mass) for mass in before]
    starts: list[ABCState] = []
    empty = x.empty()
    for mass in before:
        named = None if local.ids is None else monoid.name(mass[-1])
        starts.append(ABCState(mass[0], empty.keys, empty.values, named, mass[1] if len(mass) > 2 else None))
    # Then what each stretch writes with the weights that follow from them; these are sums.
    sums: list[Value] = []
    for part, here, start, (_, document) in zip(parts, local.parts, starts, tails, strict=False):
        after = _stretch(part, local.ids_of(here), start)[1]
        sums.append((torch.cat([after.keys, after.values], -1), document))
    states = associative_exclusive_scan(sums, monoid.add, monoid.identity(sums[0]), *ring, total=total)
    if state is not None:
        first = (torch.cat([state.keys, state.values], -1), local.document_before(state.document, batch))
        states = [monoid.add(first, value) for value in states]
    found = []
    for start, (both, _) in zip(starts, states, strict=True):
        keys, values = x.split(both)
        found.append(replace(start, keys=keys, values=values))
    return found
