"""The oracle of the attention tests: dense fp64 attention with an explicit mask, forward and backward.

Softcap, sink, ALiBi and dropout are written out here too, the dropout's hash in numpy's uint32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from longctx.attention.band import Rule
from longctx.layout import Span, get_layout

NONE = torch.zeros((), dtype=torch.float64)


class Results(NamedTuple):
    """out (B, H, T, Dv), lse (B, H, T), dq, dk, dv; dsink, dalibi (H,), or one zero where there is none."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dsink: torch.Tensor = NONE
    dalibi: torch.Tensor = NONE


class Extras(NamedTuple):
    """What goes beyond scale * q.k; as ring_attention takes it, with one seed a row."""

    softcap: float | None = None
    sink: torch.Tensor | None = None
    alibi: torch.Tensor | None = None
    dropout_p: float = 0.0
    seeds: torch.Tensor | None = None


PLAIN = Extras()


def visible(q_index: torch.Tensor, k_index: torch.Tensor, rule: Rule) -> torch.Tensor:
    """(1, 1, Tq, Tk) bool: the rule, pair by pair."""
    i, j = q_index[:, None], k_index[None, :]
    allowed = torch.ones(len(q_index), len(k_index), dtype=torch.bool)
    if rule.right is not None:
        allowed &= j - i <= rule.right
    if rule.left is not None:
        allowed &= i - j <= rule.left
    if rule.length is not None:
        allowed &= (i < rule.length) & (j < rule.length)
    return allowed[None, None]


def same_document(q_ids: torch.Tensor | None, k_ids: torch.Tensor | None) -> torch.Tensor:
    """(B or 1, 1, Tq, Tk) bool."""
    if q_ids is None or k_ids is None:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)
    return ((q_ids[:, :, None] == k_ids[:, None, :]) & (q_ids >= 0)[:, :, None])[:, None]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor,
    scale: float,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    extras: Extras = PLAIN,
    offset: int = 0,
) -> Results:
    """Dense attention in fp64; rows that see nothing have out 0, lse -inf (or the sink), no gradient.

    offset: index of the first query, where that of the first key is 0.
    """
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    sink, alibi = (None if x is None else x.detach().double().requires_grad_() for x in (extras.sink, extras.alibi))
    group, (batch, heads, rows, _), cols = q.shape[1] // k.shape[1], q.shape, k.shape[2]
    i, j = torch.arange(rows) + offset, torch.arange(cols)
    logits = q @ k.repeat_interleave(group, 1).mT * scale
    if extras.softcap is not None:
        logits = extras.softcap * torch.tanh(logits / extras.softcap)
    if alibi is not None:
        logits = logits - alibi[:, None, None] * (i[:, None] - j).abs()
    logits = logits.masked_fill(~allowed, -math.inf)
    extra = torch.full((heads,), -math.inf).double() if sink is None else sink
    lse = torch.logsumexp(torch.cat([logits, extra[:, None, None].expand(batch, heads, rows, 1)], -1), -1)
    blind = lse == -math.inf
    probabilities = torch.exp(logits - lse.masked_fill(blind, math.inf)[..., None])
    if extras.dropout_p:
        assert extras.seeds is not None
        probabilities = probabilities * kept(extras.seeds, heads, i, j, extras.dropout_p) / (1 - extras.dropout_p)
    out = probabilities @ v.repeat_interleave(group, 1)
    objective = (out * dout.double()).sum()
    if dlse is not None:
        objective = objective + (lse.masked_fill(blind, 0.0) * dlse.double()).sum()
    wanted = [x for x in (q, k, v, sink, alibi) if x is not None]
    grads = iter(torch.autograd.grad(objective, wanted))
    return Results(out.detach(), lse.detach(), *(NONE if x is None else next(grads) for x in (q, k, v, sink, alibi)))


def kept(seeds: torch.Tensor, heads: int, i: torch.Tensor, j: torch.Tensor, p: float) -> torch.Tensor:
    """(B, H, Tq, Tk) bool: what dropout keeps, in uint32 arithmetic."""
    with np.errstate(over="ignore"):
        seed, head = seeds.numpy().view(np.uint64), np.arange(1, heads + 1, dtype=np.uint32)
        low, high = (seed & np.uint64(0xFFFFFFFF)).astype(np.uint32), (seed >> np.uint64(32)).astype(np.uint32)
        stream = _mix(low[:, None] ^ _mix(high[:, None] + np.uint32(0x9E3779B9) * head))
        row = _mix(stream[:, :, None] + i.numpy().astype(np.uint32))
        key = j.numpy().astype(np.uint32) * np.uint32(0x85EBCA6B) + np.uint32(0xC2B2AE35)
        return torch.from_numpy(_mix(row[..., None] ^ key) >= np.uint32(round(p * 2**32)))


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def indices(spans: tuple[Span, ...]) -> torch.Tensor:
    """Global indices in local order."""
    return torch.cat([torch.arange(s.count) * s.stride + s.start for s in spans])


def parts(layout: str, ring: int, length: int) -> list[torch.Tensor]:
    """Global indices of every rank."""
    return [indices(get_layout(layout).spans(rank, ring, length)) for rank in range(ring)]


def difference(got: Results, expected: Results) -> float:
    """The largest absolute difference; infinities must stand in the same places."""
    assert torch.equal(got.lse == -math.inf, expected.lse == -math.inf)
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        delta = (a.double() - b.double()).masked_fill(b == -math.inf, 0.0).abs().max()
        assert not delta.isnan()
        worst = max(worst, float(delta))
    return worst


def relative_difference(got: Results, expected: Results) -> float:
    """The largest difference, relative to a tensor's largest value where that is above one; `got` on any device."""
    assert torch.equal(got.lse.cpu() == -math.inf, expected.lse == -math.inf)
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if b.numel():
            finite = b.masked_fill(b == -math.inf, 0.0)
            apart = (a.cpu().double().masked_fill(b == -math.inf, 0.0) - finite).abs().max()
            assert not apart.isnan()
            worst = max(worst, float(apart / finite.abs().max().clamp(min=1.0)))
    return worst
