"""The terms of EL's logits and the folding of W_k, against keys computed in full."""

from __future__ import annotations

import pytest
import torch
from decode.test_el import assert_equal
from torch.nn import functional

from longctx.decode.logits import Logits, expand, rows_of
from longctx.decode.norm import Norm
from longctx.decode.position import Alibi

F64 = torch.float64


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64)


@pytest.mark.parametrize("mask", ["bool", "floating"])
@pytest.mark.parametrize("ordered", [True, False])
def test_terms_are_added_in_the_order_of_models(mask: str, ordered: bool) -> None:
    """s = cap((q' . h_j + constant) * r_j + shift + rotary) + bias(i, j) + mask, tile by tile."""
    torch.manual_seed(0)
    beams, heads, tokens, keys = 2, 4, 3, 7
    constant, shift, slopes = normal(4, heads, tokens), normal(4, heads, tokens), torch.rand(heads, dtype=F64)
    scales, rotary = normal(2, keys, 2).abs(), (normal(4, heads, tokens, 5), normal(2, keys, 5))
    visible = torch.rand(4, 1, tokens, keys) < 0.7
    added = torch.zeros(4, 1, tokens, keys, dtype=F64).masked_fill(~visible, -torch.inf)
    places = torch.arange(keys) if ordered else torch.randperm(keys)
    logits = Logits(
        beams, heads, torch.tensor([4, 5, 6]), constant, scales, shift, rotary, 2.0, Alibi(slopes),
        visible if mask == "bool" else added, True, None if ordered else places,
    )  # fmt: skip
    products = normal(2, beams * heads, tokens, keys)
    parts = [logits(products[..., a:b], a, b) for a, b in ((0, 3), (3, 7))]
    found = torch.cat(parts, -1).view(2, beams, heads, tokens, keys)
    for b, m, h, t, j in torch.cartesian_prod(*(torch.arange(n) for n in found.shape)).tolist():
        row, i = b * beams + m, 4 + t
        s = (products[b, m * heads + h, t, j] + constant[row, h, t]) * scales[b, j, h // 2] + shift[row, h, t]
        s = 2.0 * torch.tanh((s + rotary[0][row, h, t] @ rotary[1][b, j]) / 2.0) - slopes[h] * (i - places[j]).abs()
        hidden = not visible[row, 0, t, j] or places[j] > i
        assert_equal(found[b, m, h, t, j], torch.tensor(-torch.inf, dtype=F64) if hidden else s)


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("competing", [True, False])
def test_folded_queries_give_the_logits_of_keys(norm: str | None, groups: int, competing: bool) -> None:
    """Exactly if something competes with the keys, else up to a number per query, which the softmax cancels."""
    torch.manual_seed(1)
    q, hidden, w_k, b_k = normal(4, 4, 3, 6), normal(2, 5, 7), normal(groups * 6, 7), normal(groups * 6)
    made = None if norm is None else Norm(norm, normal(6), normal(6) if norm == "layer" else None)  # type: ignore[arg-type]
    keys = functional.linear(hidden, w_k, b_k).unflatten(-1, (groups, 6))
    keys = keys if made is None else made(keys)
    truth = torch.einsum("bhtd,bshd->bhts", q, keys.repeat_interleave(4 // groups, 2).repeat_interleave(2, 0))
    e = expand(q, hidden, w_k, b_k, made, None, competing)
    logits = Logits(2, 4, torch.arange(3), e.constant, e.scales, e.shift)
    products = (e.queries.reshape(2, 24, 7) @ hidden.mT).view(2, 8, 3, 5)
    found = logits(products, 0, 5).view(4, 4, 3, 5)
    if competing:
        assert_equal(found, truth)
    else:
        assert e.shift is None and (e.constant is None) == (norm is None)
        assert_equal(torch.softmax(found, -1), torch.softmax(truth, -1))


def test_every_query_head_has_its_groups_row() -> None:
    assert rows_of(torch.arange(3), 4).tolist() == [[0, 1, 2]]
    assert rows_of(torch.tensor([[1], [2]]), 4).flatten().tolist() == [1, 1, 2, 2]
