"""The weights with which tokens are written into ABC's slots, for the chunks of a block; no exponent is above 0.

Each chunk has one reference r a slot, the larger of the log mass before it and of its own logits. Relative to it a
token's mass is e = exp(s - r), that of the state before is d = exp(z_before - r), and the mass that token t sees is
total_t = d + sum_{j<=t} e_j. Every weight of the formulas is a quotient of these, exp(s_j - z_t) = e_j / total_t, so
the products of a chunk need one exponential a logit and the division comes last, as in any softmax.

That is exact as long as no total_t underflows: if a slot gains more than exp(60) within one chunk (exp(600) in fp64),
`make` returns None and the caller cuts the block in two. A chunk of one token has total_t >= 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longctx.bounded.chunks import Sight, times

_SMALLEST = {torch.float32: 8.7e-27, torch.float64: 2.6e-261}  # exp(-60), exp(-600)


@dataclass(frozen=True)
class Weights:
    """Of one control in one block. Shapes (B, G, chunks, C, M) for tokens and (B, G, chunks, 1, M) for states.

    write: token j enters the memory as write_j x_j. read: what token t has read is multiplied by it (None: 1).
    carry: the memory before a chunk enters it so. close: the memory after it is divided so (None: 1). seen: whether a
    slot has been written to when t reads it (None: all have). mass: the log mass after the block (B, G, M).
    e, over, d, shut: mass of the tokens, 1 / total_t, mass before, 1 / mass after; relative to r (None for `sum`).
    """

    write: torch.Tensor
    read: torch.Tensor | None
    carry: torch.Tensor | None
    close: torch.Tensor | None
    seen: torch.Tensor | None
    mass: torch.Tensor
    e: torch.Tensor | None = None
    over: torch.Tensor | None = None
    d: torch.Tensor | None = None
    shut: torch.Tensor | None = None

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, G, chunks, n * C, M) * read."""
        return x if self.read is None else (_tokens(x, self.read) * self.read[:, :, :, None]).flatten(3, 4)

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        """The same in place."""
        if self.read is not None:
            _tokens(x, self.read).mul_(self.read[:, :, :, None])
        return x


def _tokens(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x (B, G, chunks, n * C, M) as (B, G, chunks, n, C, M), beside a factor (B, G, chunks, C, M)."""
    return x.unflatten(3, (-1, factor.shape[3]))


def make(s: torch.Tensor, mass: torch.Tensor, sight: Sight, normalizer: str) -> Weights | None:
    """The weights of logits s (B, G, chunks, C, M) after a state of log mass (B, G, M); None if a chunk is too long."""
    if sight.valid is not None:
        s = s.masked_fill(~sight.valid, 0.0 if normalizer == "sum" else -torch.inf)
    if normalizer == "sum":
        return _plain(s, mass, sight)
    top = s.amax(3, keepdim=True)
    safe = top.masked_fill(top == -torch.inf, 0.0)
    e = (s - safe).exp_()
    written = e.sum(3, keepdim=True)
    local = written.log() + safe
    if sight.after is not None:
        local = torch.logsumexp(s.masked_fill(sight.after == 0, -torch.inf), 3, keepdim=True)
    masses = _scan(mass, local[:, :, :, 0], sight.kept)
    before = masses[:, :, :-1, None]
    if sight.before is not None and sight.kept is not None:  # a state that is neither read nor kept sets no reference
        used = (sight.before.amax(3, keepdim=True) + sight.kept) > 0
        before = before.masked_fill(~used, -torch.inf)
    reference = torch.maximum(before, top)
    reference = reference.masked_fill(reference == -torch.inf, 0.0)
    share = (top - reference).exp_()
    e.mul_(share)
    d = (before - reference).exp_()
    total = sight.visible @ e
    total += times(d, sight.before)
    over, seen = total.reciprocal(), None
    least = total if sight.before is not None else total[:, :, :, :1]  # within a document it only grows
    if not bool(least.amin() >= _SMALLEST[s.dtype]):
        # What was written, not what is left of it beside the chunk's largest mass: d may underflow to 0.
        held = times((before > -torch.inf).to(s.dtype), sight.before)
        seen = (sight.visible @ (s > -torch.inf).to(s.dtype)) + held > 0
        if bool((seen & (total < _SMALLEST[s.dtype])).any()):
            return None
        over = over.masked_fill_(~seen, 0.0)
    written = written.mul_(share) if sight.after is None else times(e, sight.after).sum(3, keepdim=True)
    end = written + times(d, sight.kept)
    shut = torch.where(end > 0, end.reciprocal(), 0.0)
    if normalizer == "prefix":
        return Weights(e, over, d, shut, seen, masses[:, :, -1], e, over, d, shut)
    return Weights(e * over, None, None, None, seen, masses[:, :, -1], e, over, d, shut)


def _scan(mass: torch.Tensor, local: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """The log mass before every chunk and after the last: (B, G, chunks + 1, M)."""
    if kept is None:
        return torch.cat([mass[:, :, None], local], 2).logcumsumexp(2)
    masses = [mass]
    for chunk in range(local.shape[2]):
        mass = mass.masked_fill(kept[:, :, chunk, 0] == 0, -torch.inf)
        mass = torch.logaddexp(mass, local[:, :, chunk])
        masses.append(mass)
    return torch.stack(masses, 2)


def _plain(s: torch.Tensor, mass: torch.Tensor, sight: Sight) -> Weights:
    """Weights that are given: nothing is divided; the log mass only tells which slots were written to."""
    local = times(s.abs(), sight.after).sum(3).log()
    masses = _scan(mass, local, sight.kept)
    before = (masses[:, :, :-1, None] > -torch.inf).to(s.dtype)
    seen = sight.visible @ s.abs() + times(before, sight.before) > 0
    return Weights(s, None, None, None, None if bool(seen.all()) else seen, masses[:, :, -1])
