"""The oracle of the attention tests: dense fp64 attention with an explicit mask, forward and backward."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from longctx.attention.band import Rule
from longctx.layout import Span, get_layout


class Results(NamedTuple):
    """out (B, H, T, Dv), lse (B, H, T), dq, dk, dv."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


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
) -> Results:
    """Dense attention in fp64; rows that see nothing have out 0, lse -inf, no gradient."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(group, 1).mT * scale).masked_fill(~allowed, -math.inf)
    lse = torch.logsumexp(scores, -1)
    blind = lse == -math.inf
    probabilities = torch.exp(scores - lse.masked_fill(blind, math.inf)[..., None])
    out = probabilities @ v.repeat_interleave(group, 1)
    objective = (out * dout.double()).sum()
    if dlse is not None:
        objective = objective + (lse.masked_fill(blind, 0.0) * dlse.double()).sum()
    grads = torch.autograd.grad(objective, (q, k, v))
    return Results(out.detach(), lse.detach(), *grads)


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
        delta = (a.double() - b.double()).masked_fill(b == -math.inf, 0.0).abs().max()
        assert not delta.isnan()
        worst = max(worst, float(delta))
    return worst
