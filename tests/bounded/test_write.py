"""What a stretch of tokens writes into a state, for ABC and Cottention, against plain autograd over all tokens."""

from __future__ import annotations

import pytest
import torch
from bounded import direct
from bounded.inputs import PACKED, leaf, of_abc

from longctx.bounded.abc.write import write_slots
from longctx.bounded.cosine.write import write_state

from tolerances import tolerance

EXACT = tolerance("fp64")
TOKENS = [None, PACKED >= 0, torch.zeros(2, 37, dtype=torch.bool)]


def included(x: torch.Tensor, tokens: torch.Tensor | None, fill: float = 0.0) -> torch.Tensor:
    return x if tokens is None else x.masked_fill(~tokens[:, None, :, None], fill)


def check(ours: list[torch.Tensor], theirs: list[torch.Tensor], leaves: list[torch.Tensor]) -> None:
    """Compare results that may be -inf, and the gradients of a random loss on the finite ones."""
    g = torch.Generator().manual_seed(1)
    losses = [0.0, 0.0]
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().equal(b.isfinite())
        weight = torch.randn(a.shape, generator=g, dtype=a.dtype)
        for place, x in enumerate((a, b)):
            losses[place] = losses[place] + (x * weight)[x.isfinite()].sum()
        assert direct.differences([a.nan_to_num(neginf=0.0)], [b.nan_to_num(neginf=0.0)])[0] <= EXACT
    found, wanted = (torch.autograd.grad(loss, leaves, allow_unused=True) for loss in losses)
    assert max(direct.differences(list(found), [x if x is None else x.nan_to_num(0.0) for x in wanted])) <= EXACT


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("tokens", TOKENS)
def test_slots_are_weighted_means_or_sums(normalized: bool, tokens: torch.Tensor | None) -> None:
    (_, k, v, s, _), *_ = of_abc()
    ours = write_slots((k, v), s, normalized=normalized, tokens=tokens)
    logits = included(s if normalized else s.abs().log(), tokens, -torch.inf)
    weights = included(logits.softmax(2).nan_to_num(0.0) if normalized else s, tokens).transpose(-1, -2)
    theirs = [logits.logsumexp(2), weights @ k, weights @ v]
    if not normalized:  # the mass only tells which slots were written; no gradient flows through it
        assert direct.differences([ours[0].exp()], [theirs[0].exp()])[0] <= EXACT
        ours, theirs = ours[1:], theirs[1:]
    check(list(ours), theirs, [k, v, s])


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("tokens", TOKENS)
def test_cosine_states_are_sums_over_unit_keys(scaled: bool, tokens: torch.Tensor | None) -> None:
    (_, k, v, *_), _, g = of_abc()
    size = leaf(g, 2, 2, 37) if scaled else None
    unit = included(k / k.norm(dim=-1, keepdim=True), tokens)
    theirs = unit.transpose(-1, -2) @ (v if size is None else v * size[..., None])
    check([write_state(k, v, size, tokens)], [theirs], [k, v] if size is None else [k, v, size])


def test_excluded_tokens_may_hold_nan() -> None:
    (_, k, v, s, _), *_ = of_abc()
    tokens = PACKED >= 0
    dirty = [x.detach().masked_fill(~tokens[:, None, :, None], torch.nan) for x in (k, v, s)]
    clean = write_slots((k, v), s, tokens=tokens)
    for ours, theirs in zip(write_slots((dirty[0], dirty[1]), dirty[2], tokens=tokens), clean, strict=True):
        assert ours.equal(theirs)
    assert write_state(dirty[0], dirty[1], None, tokens).equal(write_state(k, v, None, tokens))
