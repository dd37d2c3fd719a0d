"""ABC's control strategies equal their definitions and check their arguments."""

from __future__ import annotations

import pytest
import torch
from bounded import direct
from bounded.inputs import qkv

from longctx.bounded.abc import control
from longctx.bounded.abc.operator import abc_attention
from longctx.errors import AttentionError

from tolerances import tolerance

EXACT = tolerance("fp64")
PACKED = direct.packed([[(-1, 3), (4, 17), (5, 10), (-1, 7)], [(2, 1), (3, 8), (-1, 3), (7, 25)]])


def places(documents: torch.Tensor | None, length: int = 37) -> torch.Tensor:
    """(B or 1, T): each token's index in its document."""
    return direct.counts(direct.visible(length, documents)) - 1


@pytest.mark.parametrize("documents", [None, PACKED])
def test_linformer_and_random(documents: torch.Tensor | None) -> None:
    (q, k, v), weight, _ = qkv()
    table = torch.randn(2, 4, 50, dtype=torch.float64).requires_grad_()
    seen, index = direct.visible(37, documents), places(documents).expand(2, -1).clamp_min(0)
    columns = table.permute(2, 0, 1)[index].transpose(1, 2)
    expected = direct.abc(q, k, v, columns, columns, seen, "sum", 0.7)
    ours = abc_attention(q, k, v, control.linformer(table), scale=0.7, document_ids=documents)
    direct.check(ours, expected, weight, [q, k, v, table])
    valid = None if documents is None else documents >= 0
    members = control.random(4, 9).control(k, index, valid, True)
    assert ((members == 0).sum(-1) == 1).all(), "every token has one slot"
    for normalizer, s in (("prefix", members), ("sum", members.exp()), ("running", members)):
        expected = direct.abc(q, k, v, s, s, seen, normalizer, 0.7)
        ours = abc_attention(q, k, v, control.random(4, 9), normalizer=normalizer, scale=0.7, document_ids=documents)
        direct.check(ours, expected, weight, [q, k, v])


def test_random_slots_are_even_and_differ_by_head_and_seed() -> None:
    k = torch.zeros(1, 2, 8000, 1)
    index = torch.arange(8000)[None]
    slots = [(control.random(8, seed).control(k, index, None, True) == 0).float() for seed in (0, 1)]
    share = slots[0].mean(2)
    assert (share - 1 / 8).abs().max() < 0.02  # five standard deviations of a fair draw
    for a, b in ((slots[0][0, 0], slots[0][0, 1]), (slots[0], slots[1]), (slots[0][:, :, 1:], slots[0][:, :, :-1])):
        assert abs(float((a * b).sum(-1).mean()) - 1 / 8) < 0.03


def test_strategies_check_their_arguments() -> None:
    for make_one in (lambda: control.random(0), lambda: control.window(-1), lambda: control.dilated(2, 0)):
        with pytest.raises(AttentionError, match="positive integer"):
            make_one()
    with pytest.raises(AttentionError, match="expected \\(G or 1, M, S_max\\)"):
        control.linformer(torch.zeros(3, 4))
    (q, k, v), *_ = qkv()
    with pytest.raises(AttentionError, match="for 2 key heads"):
        abc_attention(q, k, v, control.linformer(torch.zeros(3, 4, 40, dtype=torch.float64)))
    _, state = abc_attention(q, k, v, control.random(4), return_state=True)
    with pytest.raises(AttentionError, match="made by another control"):
        abc_attention(q, k, v, torch.zeros(2, 2, 37, 4, dtype=torch.float64), state=state)
    with pytest.raises(AttentionError, match="made by another control"):
        abc_attention(q, k, v, control.cluster(4), state=state)
    _, state = abc_attention(q, k, v, control.cluster(4), return_state=True)
    with pytest.raises(AttentionError, match="after a state: every iteration of k-means"):
        abc_attention(q, k, v, control.cluster(4), causal=False, state=state)
    with pytest.raises(AttentionError, match="state of 2 rows, and the batch has 1"):
        abc_attention(q[:1], k[:1], v[:1], control.cluster(4), state=state)
