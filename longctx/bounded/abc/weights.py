"""Weights with which tokens are written into ABC's slots, for the chunks of a block; no exponent is above 0.

Each chunk and slot has one reference r, the larger of the log mass before the chunk and of the chunk's own logits. All
masses are relative to it:

    e_j = exp(s_j - r)                            mass of token j
    d = exp(z_before - r)                         mass of the state before the chunk
    total_t = d + sum_{j<=t} e_j                  mass that token t sees
    end                                           mass of the state after the chunk

With z_t = log(total_t) + r, the log mass up to token t, every weight of the formulas is a quotient of these, for
example exp(s_j - z_t) = e_j / total_t. So a chunk needs one exponential per logit, and the division comes last, as in
any softmax.

This is exact as long as no total_t underflows. If a slot gains more than exp(60) within one chunk (exp(600) in fp64),
`make` returns None and the caller splits the block. A chunk of one token has total_t >= 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from longctx.bounded.chunks import ChunkMasks, times

_SMALLEST = {torch.float32: 8.7e-27, torch.float64: 2.6e-261}  # exp(-60), exp(-600)


class Normalizer(StrEnum):
    """What the weight of token j is divided by."""

    PREFIX = "prefix"
    """total_t of the token t that reads: a slot is a weighted mean."""
    RUNNING = "running"
    """total_j at the time of writing: a token keeps its weight."""
    SUM = "sum"
    """Nothing: the logits are the weights."""


@dataclass(frozen=True)
class Weights:
    """The weights of one control in one block; (B, G, chunks, C, M) per token and (B, G, chunks, 1, M) per state.

    normalizer: prefix, running or sum.
    write: token j is written as write_j x_j.
    seen: bool, whether a slot has been written to when token t reads it; None: all have.
    mass: (B, G, M), the log mass after the block.
    e, inv_total, d, inv_end: as above, the last three as used in quotients: 1 / total_t, d, 1 / end. None for `sum`.
    """

    normalizer: Normalizer
    write: torch.Tensor
    seen: torch.Tensor | None
    mass: torch.Tensor
    e: torch.Tensor | None = None
    inv_total: torch.Tensor | None = None
    d: torch.Tensor | None = None
    inv_end: torch.Tensor | None = None

    # With prefix a state between chunks is a mean. Within a chunk it is a sum: `carry` (d) turns the mean before the
    # chunk into a sum, `read` and `close` divide again. The other normalizers have sums throughout, and None is 1.

    @property
    def read(self) -> torch.Tensor | None:
        """The factor of what token t reads."""
        return self.inv_total if self.normalizer == Normalizer.PREFIX else None

    @property
    def carry(self) -> torch.Tensor | None:
        """The factor of the state before a chunk."""
        return self.d if self.normalizer == Normalizer.PREFIX else None

    @property
    def close(self) -> torch.Tensor | None:
        """The factor of the state after a chunk."""
        return self.inv_end if self.normalizer == Normalizer.PREFIX else None

    def times_read(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (B, G, chunks, n * C, M) * read."""
        return x if self.read is None else (_per_token(x, self.read) * self.read[:, :, :, None]).flatten(3, 4)

    def times_read_(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x by read in place."""
        if self.read is not None:
            _per_token(x, self.read).mul_(self.read[:, :, :, None])
        return x


def _per_token(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """View x (B, G, chunks, n * C, M) as (B, G, chunks, n, C, M), for a factor (B, G, chunks, C, M)."""
    return x.unflatten(3, (-1, factor.shape[3]))


def make(s: torch.Tensor, mass: torch.Tensor, masks: ChunkMasks, normalizer: Normalizer) -> Weights | None:
    """Return the weights of logits s (B, G, chunks, C, M) after a state of log mass (B, G, M); None if a chunk is too
    long for its logits."""
    if masks.valid is not None:
        s = s.masked_fill(~masks.valid, 0.0 if normalizer == Normalizer.SUM else -torch.inf)
    if normalizer == Normalizer.SUM:
        return _given(s, mass, masks)
    # 1. e relative to the chunk's own maximum: the log masses between chunks, and with them r, come from its sum.
    top = s.amax(3, keepdim=True)
    safe = top.masked_fill(top == -torch.inf, 0.0)
    e = (s - safe).exp_()
    written = e.sum(3, keepdim=True)
    local = written.log() + safe
    if masks.after is not None:
        local = torch.logsumexp(s.masked_fill(masks.after == 0, -torch.inf), 3, keepdim=True)
    masses = _masses(mass, local[:, :, :, 0], masks.kept)
    before = masses[:, :, :-1, None]
    if masks.before is not None and masks.kept is not None:  # a state that is neither read nor kept does not set r
        used = (masks.before.amax(3, keepdim=True) + masks.kept) > 0
        before = before.masked_fill(~used, -torch.inf)
    # 2. r, and e and d relative to it.
    r = torch.maximum(before, top)
    r = r.masked_fill(r == -torch.inf, 0.0)
    rescale = (top - r).exp_()
    e.mul_(rescale)
    d = (before - r).exp_()
    # 3. What the weights divide by.
    total = masks.visible @ e
    total += times(d, masks.before)
    if (inverted := _invert(total, s, before, masks)) is None:
        return None
    inv_total, seen = inverted
    written = written.mul_(rescale) if masks.after is None else times(e, masks.after).sum(3, keepdim=True)
    end = written + times(d, masks.kept)
    inv_end = torch.where(end > 0, end.reciprocal(), 0.0)
    write = e if normalizer == Normalizer.PREFIX else e * inv_total
    return Weights(normalizer, write, seen, masses[:, :, -1], e, inv_total, d, inv_end)


def _invert(
    total: torch.Tensor, s: torch.Tensor, before: torch.Tensor, masks: ChunkMasks
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return 1 / total_t, 0 for empty slots, and `Weights.seen`; None if a total has underflowed."""
    # Without documents total_t grows with t, so the first row tells whether all are large enough.
    least = total if masks.before is not None else total[:, :, :, :1]
    if bool(least.amin() >= _SMALLEST[s.dtype]):
        return total.reciprocal(), None
    # A slot is empty if nothing was written to it. d may underflow to 0 beside the chunk's maximum, so look at z.
    held = times((before > -torch.inf).to(s.dtype), masks.before)
    seen = (masks.visible @ (s > -torch.inf).to(s.dtype)) + held > 0
    if bool((seen & (total < _SMALLEST[s.dtype])).any()):
        return None
    return total.reciprocal().masked_fill_(~seen, 0.0), seen


def _masses(mass: torch.Tensor, local: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Return the log mass before every chunk and after the last: (B, G, chunks + 1, M)."""
    if kept is None:
        return torch.cat([mass[:, :, None], local], 2).logcumsumexp(2)
    masses = [mass]
    for chunk in range(local.shape[2]):
        mass = mass.masked_fill(kept[:, :, chunk, 0] == 0, -torch.inf)
        mass = torch.logaddexp(mass, local[:, :, chunk])
        masses.append(mass)
    return torch.stack(masses, 2)


def _given(s: torch.Tensor, mass: torch.Tensor, masks: ChunkMasks) -> Weights:
    """Use s as weights: nothing is divided, and the log mass only tells which slots were written to."""
    local = times(s.abs(), masks.after).sum(3).log()
    masses = _masses(mass, local, masks.kept)
    before = (masses[:, :, :-1, None] > -torch.inf).to(s.dtype)
    seen = masks.visible @ s.abs() + times(before, masks.before) > 0
    return Weights(Normalizer.SUM, s, None if bool(seen.all()) else seen, masses[:, :, -1])
